"""Tests against other versions of what the package stands on: `nox`, or `nox -s "versions(diffusers='0.37.0')"`."""

import nox

# SGLang's pin, vLLM-Omni's, and what constraints.txt has; the oldest with the oldest transformers it is declared for
VERSIONS = {"0.37.0": "5.13.0", "0.40.0": "5.23.0", "0.42.1": "5.23.0"}


@nox.session
@nox.parametrize("diffusers", list(VERSIONS))
def versions(session: nox.Session, diffusers: str) -> None:
    """The conformity kit and the pipelines' tests; a family whose classes a version lacks is absent there."""
    session.install("torch==2.13.0")
    session.install("-e", ".[test]", f"diffusers=={diffusers}", f"transformers=={VERSIONS[diffusers]}")
    session.run("python", "-m", "pytest", "-q", "-n", "2", "tests/families/test_conformity.py", *session.posargs)
