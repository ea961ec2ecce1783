"""Decides how every value is stored: `decide(...) -> QuantPlan`."""
