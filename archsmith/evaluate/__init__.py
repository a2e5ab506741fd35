"""Evaluators: from a trial to a result. The contract is ``archsmith.evaluate.base.Evaluator``."""
