"""The lab: problems, races between optimisers, their reports, and inspection of models.

It needs ``pip install "natgrad[lab]"`` for data, tables and figures, each imported when it is first used.
"""

from natgrad.lab.peers import Entrant, entrants
from natgrad.lab.plan import Budget
from natgrad.lab.problem import Problem, ResidualProblem
from natgrad.lab.problems import load_problem
from natgrad.lab.race import Race

__all__ = ["Budget", "Entrant", "Problem", "Race", "ResidualProblem", "entrants", "load_problem"]
