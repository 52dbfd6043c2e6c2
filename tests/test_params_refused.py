"""Params that are each good and do not go together are refused by name."""

import pytest

from rgalign.__main__ import main
