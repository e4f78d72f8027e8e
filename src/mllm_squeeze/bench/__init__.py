"""The benchmark: what a method costs and saves, against the dense model, an oracle, and the naive way.

`mllm_squeeze.bench.contest.run` is the front door; importing this package loads neither torch nor transformers.
"""
