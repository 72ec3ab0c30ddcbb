"""Credentials that obstore does not find by itself."""

import os
from pathlib import Path
from typing import Any

from llmt_shared.errors import ConfigError


def aws_profile() -> Any:
    """Return what reads the credentials in ~/.aws; ``None`` where something else is said, or there are none."""
    is_said = any(os.environ.get(f"AWS_{name}") for name in ("ACCESS_KEY_ID", "SKIP_SIGNATURE", "ROLE_ARN"))
    if is_said or not (os.environ.get("AWS_PROFILE") or Path("~/.aws/credentials").expanduser().exists()):
        return None
    try:
        from obstore.auth.boto3 import Boto3CredentialProvider
    except ImportError:
        raise ConfigError(
            "the credentials in ~/.aws are read through the package boto3, which is not installed; "
            "pip install boto3, or set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        ) from None
    return Boto3CredentialProvider()
