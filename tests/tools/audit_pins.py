"""Known vulnerabilities of the pins in constraints.txt, by pip-audit: a report, which fails nothing (make audit).

pip-audit says "No known vulnerabilities found" of packages that its database does not know as well: here they are
counted, so that silence is never taken for safety.
"""

import json
import subprocess
import sys
from pathlib import Path

PINS = Path(__file__).resolve().parents[2] / "constraints.txt"
SECONDS = 120  # for each database


def audited(service: str) -> list[dict]:
    """What a database says: one entry a pin that it knows (name, version, vulns). Empty where it cannot be reached."""
    command = [sys.executable, "-m", "pip_audit", "--requirement", str(PINS), "--no-deps", "--disable-pip"]
    command += ["--vulnerability-service", service, "--format", "json", "--progress-spinner", "off"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
        return [entry for entry in json.loads(done.stdout)["dependencies"] if "vulns" in entry]
    except (subprocess.TimeoutExpired, ValueError):  # no answer in time; no pip-audit, or its traceback
        return []


def told(known: list[dict], pins: int) -> str:
    """The report in words."""
    if not known:
        return f"audit: no vulnerability database could be reached; nothing is known of the {pins} pins"
    found = [entry for entry in known if entry["vulns"]]
    lines = [
        f"  {entry['name']} {entry['version']}: {each['id']}; mended in {', '.join(each['fix_versions']) or 'none yet'}"
        for entry in found
        for each in entry["vulns"]
    ]
    return "\n".join([f"audit: {len(known)} of {pins} pins looked up, {len(found)} known to be vulnerable", *lines])


if __name__ == "__main__":
    services = (audited(service) for service in ("pypi", "osv"))
    print(told(next(filter(None, services), []), len(PINS.read_text(encoding="utf-8").split())))
