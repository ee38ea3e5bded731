"""Is a model safe in every language, and what did it cost? Generate, judge, measure, report."""
