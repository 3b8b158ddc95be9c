"""How extras are installed."""

from flashsfa import extras


def test_the_hint_works_from_a_clone_and_from_a_release(tmp_path, monkeypatch):
    module = tmp_path / "src" / "flashsfa" / "extras.py"
    monkeypatch.setattr(extras, "__file__", str(module))
    assert extras.install_hint("hf") == "pip install 'flashsfa[hf]'"
    (tmp_path / "pyproject.toml").touch()
    assert extras.install_hint("hf") == "pip install -e '.[hf]' in a clone of the repository"
