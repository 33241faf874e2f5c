"""dskd-eval: instruction-following, maths and code benchmarks through lm-evaluation-harness."""
