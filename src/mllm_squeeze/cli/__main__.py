"""`python -m mllm_squeeze.cli` is the command `mllm-squeeze`."""

from mllm_squeeze.cli import main

main()
