import pytest

pytest.register_assert_rewrite("tests.unit.routing_oracle", "tests.unit.deepseek_v1")
