"""SequeL's framework-neutral core: tasks, the plan, settings and the orchestrator; imports neither torch nor jax."""
