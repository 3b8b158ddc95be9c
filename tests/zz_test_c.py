import sys; sys.path.insert(0,'/work/main/tests')
from test_training import *
def test_compiled(tmp_path, content, converted):
    import torch._dynamo as dy
    content["training"] |= {"compile": True, "tokens": 8*4*CONTEXT}
    dy.utils.counters.clear()
    assert run(tmp_path, distill_content(content, converted, weight=1.0, logits=1.0), command="distill") == 0
    rows=[r for r in result(tmp_path)["curve"] if "loss" in r]
    print("COUNTERS", dict(dy.utils.counters["stats"]), dict(dy.utils.counters["graph_break"]), dict(dy.utils.counters.get("recompiles",{})), [r["attention_distance"] for r in rows])
