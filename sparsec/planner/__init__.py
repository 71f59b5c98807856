"""From a mask and a problem to a plan: what runs, in which order of tokens, and why."""

from sparsec.planner.plans import Candidate, Group, Plan, Refusal, Step
from sparsec.planner.renewal import renewed
from sparsec.planner.search import plan

__all__ = ["Candidate", "Group", "Plan", "Refusal", "Step", "plan", "renewed"]
