"""Deciding, round by round, what to guess and how much: measured costs, running estimates, the plan, the guard."""
