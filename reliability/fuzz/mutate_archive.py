"""Break a ZIP archive: members go, come twice, change names or content."""

import io
import random
import zipfile
from collections.abc import Callable

from reliability.fuzz.mutate_bytes import mutate_bytes

NAMES = ("", "x", "../x", "/x", "a/../b", "CON", "x" * 300, "é")


def mutate_archive(
    content: bytes,
    generator: random.Random,
    mutate_member: Callable[[str, bytes, random.Random], bytes],
) -> bytes:
    """Return the archive with one to three members changed, all stored without compression.

    Args:
        content: The archive; one that is broken already gets other bytes.
        generator: What is drawn comes from here.
        mutate_member: Breaks the content of a member; gets its name.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            members = [(info.filename, archive.read(info)) for info in archive.infolist()]
    except Exception:  # broken before; zipfile raises many kinds
        return mutate_bytes(content, generator)
    for _ in range(generator.choice((1, 1, 1, 2, 3))):
        if not members:
            break
        place = generator.randrange(len(members))
        name, data = members[place]
        choice = generator.randrange(10)
        if choice == 0:
            del members[place]
        elif choice == 1:
            members.append((name, generator.choice(members)[1]))
        elif choice == 2:
            other = generator.choice((*NAMES, *(other for other, _ in members), name + "x"))
            members[place] = (other, data)
        elif choice == 3:
            members[place] = (name, mutate_bytes(data, generator))
        else:
            members[place] = (name, mutate_member(name, data, generator))
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in members:
            # writestr warns of names that come twice; a ZipInfo of our own keeps the date fixed.
            info = zipfile.ZipInfo(name or "_")
            archive.NameToInfo.pop(info.filename, None)
            archive.writestr(info, data)
    return buffer.getvalue()
