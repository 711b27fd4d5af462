"""Studies: arms × settings × seeds declared in one file, and what is reported of them.

Imports neither verl nor Ray: a report is made from the declaration and the collected data alone.
"""
