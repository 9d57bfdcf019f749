"What the site's scripts share."
import hashlib
import io
import os
import sys
import tarfile
from pathlib import Path
from urllib.request import urlopen

from diffusers import DDIMScheduler

from ddpo_scratch.pipelines import ddim_scheduler, pipeline_source
from ddpo_scratch.sampling import ddim_schedule


def noise_levels(eta):
    "The schedule of the embedded model's 20 steps."
    scheduler = DDIMScheduler.from_pretrained(pipeline_source("emoji"), subfolder="scheduler")
    return ddim_schedule(ddim_scheduler(scheduler.config), 20, eta)


def from_npm(name, version, sha256):
    "The files of a package of the npm registry, which is kept in the user's cache."
    url = f"https://registry.npmjs.org/{name}/-/{name}-{version}.tgz"
    kept = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / Path(url).name
    if not kept.exists() or hashlib.sha256(kept.read_bytes()).hexdigest() != sha256:
        with urlopen(url, timeout=60) as answer: data = answer.read()
        found = hashlib.sha256(data).hexdigest()
        if found != sha256: sys.exit(f"{url} has the SHA-256 {found}, and {sha256} is wanted.")
        kept.parent.mkdir(parents=True, exist_ok=True)
        part = kept.with_suffix(f".{os.getpid()}")
        part.write_bytes(data)
        part.replace(kept)
    with tarfile.open(fileobj=io.BytesIO(kept.read_bytes())) as archive:
        return {member.name.removeprefix("package/"): archive.extractfile(member).read()
                for member in archive.getmembers() if member.isfile()}
