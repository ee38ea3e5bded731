"""Evaluation of models in every language: generate responses, judge them, measure, and write a report."""
