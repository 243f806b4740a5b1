"""What several tests share. No test module imports another one: helpers are here, fixtures in
conftest.py.
"""

from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
