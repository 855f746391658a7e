import pytest

pytest.register_assert_rewrite(
    "tests.compat.masks_and_calls", "tests.compat.wrapped_models", "tests.compat.baked_models"
)
