"""MindIE-LLM's commands for Mixtral, on this engine: run_pa.sh, run_pa.py, convert_quant_weights.py, run.sh.

The files at their paths only call `main`. `dialogue_grammar` and `modeltest_grammar` take words and give plain data.
`docs/from_mindie.md` says for users what each word becomes.
"""
