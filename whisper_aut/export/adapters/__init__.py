"""Adapters that run our encoders in other evaluation suites.

A suite is imported only when its adapter is used.
"""
