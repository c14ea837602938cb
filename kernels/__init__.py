"""The engine "triton"."""
