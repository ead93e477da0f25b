"""The stores that there are, a class each: how it is reached, what it lacks words for, its etags.

A URL's scheme picks one; see `urls.SCHEMES`. Nothing else in this folder knows one from another.
Each takes its credentials from the environment, under the names that obstore has for them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any, ClassVar

from obstore.store import AzureStore, GCSStore, S3Store

from sharding.errors import InputError
from sharding.shards import REPLACED

Store = S3Store | AzureStore | GCSStore
_NOT_ALLOWED = "these credentials do not allow it"
NO_OBJECT = "there is no such object"


class Scheme:
    """What one kind of store has of its own."""

    prefix: ClassVar[str]  # of its URLs
    where: ClassVar[str]  # how they are written
    bucket: ClassVar[str]  # what it calls a bucket
    endpoints: ClassVar[tuple[str, ...]]  # variables that say where it is, the first one set counts
    check: ClassVar[str]  # what to check if nothing answers there
    credentials: ClassVar[str]  # what to do if there are none
    misplaced: ClassVar[str] = ""  # what answers of 301 and 400 may mean
    metadata: ClassVar[str]  # what the attribute "run" of an object becomes
    deleting: ClassVar[str]  # the right to delete
    cures: ClassVar[
        Mapping[str, str]
    ]  # a code that it gives, or words of obstore's -> in our words

    def endpoint(self) -> str:
        """Return where the store is, if not in its usual place.

        Raises:
            InputError: it is no URL; obstore itself would panic.
        """
        return self._first(*self.endpoints)

    def _first(self, *names: str) -> str:
        """Return the first endpoint that one of these variables gives."""
        for name in names:
            if endpoint := os.environ.get(name, ""):
                if not re.fullmatch(r"https?://[^\s/]+(/\S*)?", endpoint):
                    cure = "not a URL such as http://127.0.0.1:9000 or https://HOST"
                    raise InputError(f"{name}: {cure}")
                return endpoint
        return ""

    def usual(self) -> str:
        """Return where it is if there is no endpoint."""
        raise NotImplementedError

    def open(self, bucket: str, **options: Any) -> Store:
        """Return the store of a bucket.

        Args:
            options: that all stores have: `client_options`, `retry_config`.
        """
        raise NotImplementedError

    def spellings(self, etag: str) -> tuple[str, ...]:
        """Return what to try as the condition of a write, given an etag in quotes."""
        return (etag,)


class Amazon(Scheme):
    """S3, and what speaks it: MinIO, Ceph, R2, SeaweedFS."""

    prefix = "s3://"
    where = "s3://BUCKET/PREFIX"
    bucket = "bucket"
    endpoints = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
    check = "AWS_ENDPOINT_URL"
    credentials = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
    misplaced = "is the bucket in another region (AWS_REGION)?"
    metadata = "x-amz-meta-run"
    deleting = "s3:DeleteObject"
    _region = "the bucket is in another region; set AWS_REGION"
    cures: ClassVar[Mapping[str, str]] = {
        "InvalidRange": REPLACED,
        "NoSuchKey": NO_OBJECT,
        "NoSuchBucket": "there is no such bucket; check its name, and AWS_ENDPOINT_URL",
        "InvalidBucketName": "no bucket can have that name",
        "InvalidAccessKeyId": "the store does not know this key; check AWS_ACCESS_KEY_ID",
        "SignatureDoesNotMatch": "the key's secret is wrong; check AWS_SECRET_ACCESS_KEY",
        "ExpiredToken": "the credentials have expired; renew them",
        "InvalidToken": "the session token is wrong; check AWS_SESSION_TOKEN",
        "AccessDenied": _NOT_ALLOWED,
        "PermanentRedirect": _region,
        "AuthorizationHeaderMalformed": _region,
        "IllegalLocationConstraintException": _region,
        "NotImplemented": "the store cannot do that",
    }
    # Where credentials come from, if not from a profile or from the machine's role.
    _KEYS = ("AWS_ACCESS_KEY_ID", "AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_SKIP_SIGNATURE")

    def usual(self) -> str:
        """Return where it is if there is no endpoint."""
        return "https://s3.amazonaws.com"

    def open(self, bucket: str, **options: Any) -> Store:
        """Return the store of a bucket."""
        if endpoint := self.endpoint():
            options["endpoint"] = endpoint
        if not any(map(os.environ.get, self._KEYS)) and (provider := _profile()):
            options["credential_provider"] = provider
        elif not os.environ.get("AWS_REGION"):
            options["region"] = os.environ.get("AWS_DEFAULT_REGION", "us-east-1")
        return S3Store(bucket, conditional_put="etag", **options)

    def spellings(self, etag: str) -> tuple[str, ...]:
        """Return the etag with its quotes and without, as Ceph 16 wants it."""
        return etag, etag.strip('"')


def _profile() -> Any:
    """Return what takes credentials from a profile, single sign-on included, if there is one.

    Raises:
        InputError: a profile is named, but boto3, which reads it, is not installed.
    """
    named = os.environ.get("AWS_PROFILE")
    if not named and not os.path.exists(os.path.expanduser("~/.aws/credentials")):
        return None
    try:
        from obstore.auth.boto3 import Boto3CredentialProvider

        return Boto3CredentialProvider()
    except ImportError:
        if named:
            cure = "run: pip install boto3, or set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
            raise InputError(f"AWS_PROFILE {named!r} is read by boto3; {cure}") from None
        return None
    except Exception as error:  # boto3 raises many kinds
        raise InputError(f"AWS_PROFILE {named!r}: {error}") from None


class Azure(Scheme):
    """Azure Blob Storage, and its emulator."""

    prefix = "az://"
    where = "az://CONTAINER/PREFIX"
    bucket = "container"
    endpoints = ("AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT")
    check = "AZURE_STORAGE_ACCOUNT_NAME, AZURE_STORAGE_ENDPOINT"
    credentials = (
        "set AZURE_STORAGE_ACCOUNT_KEY or AZURE_STORAGE_SAS_TOKEN, "
        "or, to use those of `az login`, AZURE_USE_AZURE_CLI=true"
    )
    metadata = "x-ms-meta-run"
    deleting = "that: d in a SAS token, or the role Storage Blob Data Contributor"
    _wrong = "the credentials are wrong; check AZURE_STORAGE_ACCOUNT_KEY or AZURE_STORAGE_SAS_TOKEN"
    _no_name = "no container can have that name"
    cures: ClassVar[Mapping[str, str]] = {
        "InvalidRange": REPLACED,
        "BlobNotFound": NO_OBJECT,
        "ContainerNotFound": "there is no such container; check its name, and the account",
        "ContainerBeingDeleted": "the container is being deleted",
        "ResourceNotFound": "there is no such account; check AZURE_STORAGE_ACCOUNT_NAME",
        "InvalidResourceName": _no_name,
        "OutOfRangeInput": _no_name,
        "AuthenticationFailed": f"{_wrong}, and whether the token has expired",
        "AuthorizationFailure": f"{_wrong}, or the account's firewall",
        "NoAuthenticationInformation": f"no credentials; {credentials}",
        "InvalidAuthenticationInfo": _wrong,
        "Invalid Access Key": "AZURE_STORAGE_ACCOUNT_KEY is no key of an account",
        "SAS query pair": "AZURE_STORAGE_SAS_TOKEN is no SAS token",
        "az account get-access-token": "`az` gives no token; run: az login",
        "AuthorizationPermissionMismatch": _NOT_ALLOWED,
        "AuthorizationServiceMismatch": _NOT_ALLOWED,
        "AuthorizationResourceTypeMismatch": _NOT_ALLOWED,
        "InsufficientAccountPermissions": _NOT_ALLOWED,
        "PublicAccessNotPermitted": f"it is not public; {credentials}",
        "InvalidBlockList": "another has written it meanwhile; run again with --resume",
    }
    # Where credentials come from, if not from the machine's identity.
    _KEYS = (
        "AZURE_STORAGE_ACCOUNT_KEY",
        "AZURE_STORAGE_ACCESS_KEY",
        "AZURE_STORAGE_MASTER_KEY",
        "AZURE_STORAGE_SAS_TOKEN",
        "AZURE_STORAGE_SAS_KEY",
        "AZURE_STORAGE_TOKEN",
        "AZURE_STORAGE_CLIENT_ID",
        "AZURE_CLIENT_ID",
        "AZURE_USE_AZURE_CLI",
        "AZURE_SKIP_SIGNATURE",
    )

    def endpoint(self) -> str:
        """Return where the store is, if it is not Azure's; the emulator, for example."""
        if _is_on("AZURE_STORAGE_USE_EMULATOR"):
            return self._first("AZURITE_BLOB_STORAGE_URL") or "http://127.0.0.1:10000"
        return super().endpoint()

    def usual(self) -> str:
        """Return where it is if there is no endpoint."""
        return f"https://{os.environ.get('AZURE_STORAGE_ACCOUNT_NAME')}.blob.core.windows.net"

    def open(self, bucket: str, **options: Any) -> Store:
        """Return the store of a container.

        Raises:
            InputError: no account is named, or only in a way that obstore does not read.
        """
        if "@" in bucket:
            raise InputError(f"'az://{bucket}': give {self.where}, with no account in it")
        if not _is_on("AZURE_STORAGE_USE_EMULATOR"):
            name = os.environ.get("AZURE_STORAGE_ACCOUNT_NAME")
            known = name and any(map(os.environ.get, self._KEYS))
            if os.environ.get("AZURE_STORAGE_CONNECTION_STRING") and not known:
                raise InputError(
                    "AZURE_STORAGE_CONNECTION_STRING is not read; set AZURE_STORAGE_ACCOUNT_NAME "
                    "and AZURE_STORAGE_ACCOUNT_KEY to its AccountName and AccountKey"
                )
            if not name:
                other = os.environ.get("AZURE_STORAGE_ACCOUNT")
                instead = "; AZURE_STORAGE_ACCOUNT is not read" if other else ""
                raise InputError(f"no account; set AZURE_STORAGE_ACCOUNT_NAME{instead}")
            if endpoint := self.endpoint():
                options["endpoint"] = endpoint
        return AzureStore(bucket, **options)


class Google(Scheme):
    """Google Cloud Storage, to read from."""

    prefix = "gs://"
    where = "gs://BUCKET/PREFIX"
    bucket = "bucket"
    endpoints = ("GOOGLE_BASE_URL",)
    check = "GOOGLE_BASE_URL"
    credentials = (
        "set GOOGLE_APPLICATION_CREDENTIALS, or run: gcloud auth application-default login; "
        "for what is public: GOOGLE_SKIP_SIGNATURE=true"
    )
    metadata = "x-goog-meta-run"
    deleting = "storage.objects.delete"
    cures: ClassVar[Mapping[str, str]] = {
        "InvalidRange": REPLACED,
        "NoSuchKey": NO_OBJECT,
        "NoSuchBucket": "there is no such bucket; check its name",
        "InvalidBucketName": "no bucket can have that name",
        "AccessDenied": _NOT_ALLOWED,
        "AuthenticationRequired": f"no credentials; {credentials}",
        "service account file": "the file of credentials cannot be read; "
        "check GOOGLE_APPLICATION_CREDENTIALS and GOOGLE_SERVICE_ACCOUNT",
    }

    def usual(self) -> str:
        """Return where it is if there is no endpoint."""
        return "https://storage.googleapis.com"

    def open(self, bucket: str, **options: Any) -> Store:
        """Return the store of a bucket."""
        if endpoint := self.endpoint():
            options["base_url"] = endpoint
        return GCSStore(bucket, **options)


def _is_on(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("1", "true", "on", "yes", "y")


_SCHEMES = {scheme.prefix: scheme for scheme in (Amazon(), Azure(), Google())}


def scheme_of(url: str) -> Scheme:
    """Return what is special about the store that a URL leads to."""
    return _SCHEMES[url[: url.index("://") + 3]]
