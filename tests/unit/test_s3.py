"""TensorStore is told to find buckets of Amazon's kind where Amazon's own tools would."""

import pytest

from bucket import forget_servers
from glamcli import s3
from glamcli.errors import CheckpointError

CONFIG = """
[default]
endpoint_url = http://127.0.0.1:1
region = eu-west-2
[profile company]
credential_process = /bin/echo '{"Version": 1, "AccessKeyId": "a", "SecretAccessKey": "b"}'
[profile broken]
credential_process = /bin/false
[profile person]
sso_session = mine
sso_account_id = 1
sso_role_name = any
[sso-session mine]
sso_region = eu-west-1
sso_start_url = https://127.0.0.1/start
"""


@pytest.fixture
def config(monkeypatch, tmp_path):
    """The files of Amazon's tools, and no variables of theirs but those that name them."""
    pytest.importorskip("s3fs")
    for name in ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    (tmp_path / "config").write_text(CONFIG)
    forget_servers()
    yield tmp_path / "config"
    forget_servers()


def test_keys_in_variables_and_an_endpoint_are_those_of_the_tools(config, monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "mine")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    there = {"endpoint": "http://127.0.0.1:1", "aws_region": "eu-west-2"}
    assert s3.options() == {"aws_credentials": {"type": "environment"}, **there}
    forget_servers()
    monkeypatch.setenv("AWS_CONFIG_FILE", "/dev/null")
    assert s3.options() == {"aws_credentials": {"type": "environment"}}, "Amazon's own servers"


def test_a_profile_is_read_from_where_the_tools_read_it(config, monkeypatch):
    monkeypatch.setenv("AWS_PROFILE", "company")
    files = {"config_file": str(config), "credentials_file": "/dev/null"}
    about = {"type": "profile", "profile": "company", **files}
    assert s3.options()["aws_credentials"] == about


LOGINS = [("person", "of kind `sso`"), ("default", "no login"), ("broken", "none that helps")]


@pytest.mark.parametrize(("profile", "what"), LOGINS)
def test_a_login_that_tensorstore_cannot_use_is_refused(config, monkeypatch, profile, what):
    monkeypatch.setenv("AWS_PROFILE", profile)
    with pytest.raises(CheckpointError, match=what) as refused:
        s3.options()
    assert ("export-credentials" in str(refused.value.hint)) == (profile != "broken")
