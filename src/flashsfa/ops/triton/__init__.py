"""What all Triton kernels share. Imported only where they run, so that `import flashsfa` needs no Triton."""

from . import first_use

first_use.announce()
