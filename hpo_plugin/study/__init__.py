"""Studies: arms × settings × seeds declared in one file, and what is reported of them.

A report is made from the declaration and the collected data alone, without verl and Ray.
"""
