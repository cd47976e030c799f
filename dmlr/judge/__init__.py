"""Is an answer right? By rules (rules.py), or by an LLM where the rules cannot tell (llm_judge.py).

A judge is a function: prediction and ground truth in, verdict out. Knows nothing of models, runs and records.
"""

from dmlr.judge.rules import Verdict, judge

__all__ = ["Verdict", "judge"]
