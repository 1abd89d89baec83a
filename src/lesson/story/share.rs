//! Share: a machine in a file, and what travels with it.

use super::GOLDEN;
use crate::lesson::{At, Chapter, Claim, Notes, Question, Step, run};

/// Anna's machine, and Emil's, which woke from her file.
const BOTH: &[&str] = &[
    "catnap restore anna@party -p {port}:80",
    "catnap snapshot export anna@party anna.catnap --yes",
    "CATNAP_HOME=emil catnap snapshot import anna.catnap",
    "CATNAP_HOME=emil catnap restore anna@party --name bella -p {port2}:80",
];

pub const CHAPTER: Chapter = Chapter {
    name: "share",
    title: "Sharing images",
    aim: "Share a machine with others, know what travels with it, and what it means to start one of a stranger's.",
    strike: &[
        "[ ! -d emil ] || CATNAP_HOME=emil catnap rm --force bella >/dev/null 2>&1",
        "[ ! -d frida ] || CATNAP_HOME=frida catnap rm --force carla >/dev/null 2>&1",
        "rm -rf emil frida anna.catnap bad.catnap public.catnap",
    ],
    steps: &[
        Step {
            name: "export",
            title: "A machine in a file",
            story: "Emil would like to have a machine like Anna's. She notes the password of her shop on it, as one does, \
                    and writes a snapshot of the running machine to one file.",
            watch: "What is said before the file is written.",
            stage: GOLDEN,
            needs: &["anna@golden"],
            makes: &["anna@party"],
            acts: &[
                run("catnap exec anna -- sh -c 'echo password=Tuna4Ever > /root/shop.conf; sync'"),
                run("catnap snapshot create anna@party"),
                run("catnap snapshot export anna@party anna.catnap --yes --json").named("exported"),
            ],
            looks: &[At { name: "anna", port: "port", path: "/api/status" }],
            claims: &[
                Claim {
                    says: "Memory and disk are {exported.content_bytes:mib}; the file has {exported.bytes:mib}, and needs \
                           nothing else.",
                    holds: |f| Some(f.number("exported.bytes")? < f.number("exported.content_bytes")?),
                },
                Claim {
                    says: "{exported.secrets} secrets were found in it.",
                    holds: |f| Some(f.number("exported.secrets")? >= 2.0),
                },
            ],
            figure: "{exported.bytes:mib} for a machine that runs",
            notes: Notes {
                minutes: 2,
                say: "A file can be mailed, copied to a stick, or pushed to a registry. Whoever has it has the machine.",
                wrong: "Writing takes a while on slow disks. Talk about what is in it meanwhile.",
            },
            ..Step::EMPTY
        },
        Step {
            name: "wake",
            title: "Emil wakes it",
            story: "Emil has a house of his own, CATNAP_HOME=emil, with nothing of Anna's in it. He takes the file in and \
                    wakes what is in it.",
            watch: "Its page on the second port, beside Anna's: the same counter, from where the snapshot was taken.",
            stage: &["catnap restore anna@party -p {port}:80", "catnap snapshot export anna@party anna.catnap --yes"],
            needs: &["anna@party"],
            acts: &[
                run("CATNAP_HOME=emil catnap snapshot import anna.catnap --json").named("imported"),
                run("CATNAP_HOME=emil catnap restore anna@party --name bella -p {port2}:80 --json").named("woken"),
            ],
            looks: &[At { name: "bella", port: "port2", path: "/api/status" }],
            claims: &[
                Claim {
                    says: "It woke in Emil's house, in the middle of what it was doing in Anna's.",
                    holds: |f| {
                        let same = f.same("bella.nonce", "anna.nonce")? && f.same("bella.boot_id", "anna.boot_id")?;
                        Some(same && f.get("woken.resumed")?.as_bool()?)
                    },
                },
                Claim {
                    says: "What arrived is what was sent, to the bit: {imported.digest}",
                    holds: |f| f.same("imported.digest", "exported.digest"),
                },
                Claim {
                    says: "It is somebody of its own, though: it is called {bella.hostname} now.",
                    holds: |f| {
                        Some(f.text("bella.hostname")? == "bella" && !f.same("bella.hostname", "anna.hostname")?)
                    },
                },
            ],
            notes: Notes {
                minutes: 1,
                say: "Two machines with the same keys, the same random numbers and the same name would be trouble. That is \
                      why a woken copy is told that it is one.",
                wrong: "The second port is taken: catnap lesson reset, and run --port with another one.",
            },
            ..Step::EMPTY
        },
        Step {
            name: "push",
            title: "Only what changed",
            story: "Emil asks for the next one, too. Anna pushes to the registry that the two of them use for containers, and \
                    then takes another snapshot and pushes that.",
            watch: "How much travels the second time, and how much Emil fetches.",
            stage: BOTH,
            needs: &["anna@party"],
            makes: &["anna@later"],
            only_with: Some((
                "registry",
                "There is no registry here, so this is told and not played. With one: \
                 CATNAP_LESSON_REGISTRY=localhost:5000 catnap lesson run share/push",
            )),
            acts: &[
                run("catnap snapshot push anna@party {registry}/anna/site:party --plain-http --yes --json").named("first"),
                run("catnap snapshot create anna@later"),
                run("catnap snapshot push anna@later {registry}/anna/site:later --plain-http --yes --json").named("second"),
                run("CATNAP_HOME=emil catnap snapshot pull {registry}/anna/site:later --plain-http --json").named("pulled"),
            ],
            claims: &[
                Claim {
                    says: "Of the second, {second.sent_bytes:mib} of {second.stored_bytes:mib} were sent.",
                    holds: |f| Some(f.number("second.sent_bytes")? * 3.0 < f.number("second.stored_bytes")?),
                },
                Claim {
                    says: "Emil fetched {pulled.fetched_bytes:mib}: the rest he had from the file.",
                    holds: |f| Some(f.number("pulled.fetched_bytes")? * 3.0 < f.number("second.stored_bytes")?),
                },
                Claim {
                    says: "What arrived is what was sent, to the bit: {pulled.digest}",
                    holds: |f| f.same("pulled.digest", "second.digest"),
                },
            ],
            notes: Notes {
                minutes: 1,
                say: "The registry keeps memory and disk in chunks that are named by their digests. Whoever has a chunk \
                      never fetches it again. This one speaks plain HTTP, which no registry outside of a classroom should.",
                wrong: "No registry: scripts/lesson starts one. By hand, any will do, docker's registry image for one.",
            },
            ..Step::EMPTY
        },
        Step {
            name: "secrets",
            title: "What travelled along",
            story: "Emil looks around. Anna had not meant to send him everything.",
            watch: "The first line of a private key, and a password.",
            stage: BOTH,
            needs: &["anna@party"],
            acts: &[
                run("CATNAP_HOME=emil catnap exec bella -- head -n 1 /root/.ssh/id_ed25519").named("key"),
                run("CATNAP_HOME=emil catnap exec bella -- cat /root/shop.conf").named("shop"),
                run("catnap snapshot inspect --secrets anna@party").named("found"),
            ],
            claims: &[
                Claim {
                    says: "Emil has Anna's private key: {key.text}",
                    holds: |f| Some(f.text("key.text")?.contains("PRIVATE KEY")),
                },
                Claim {
                    says: "Emil has her password: {shop.text}",
                    holds: |f| Some(f.text("shop.text")? == "password=Tuna4Ever"),
                },
                Claim {
                    says: "Both could have been known beforehand.",
                    holds: |f| {
                        let found = f.text("found.text")?;
                        Some(found.contains("private key") && found.contains("password"))
                    },
                },
            ],
            ask: Some(Question {
                text: "Anna deletes the file with the password, and then exports. Is it gone?",
                answers: [
                    "Yes: deleted is deleted",
                    "Yes, if she also empties the bin",
                    "No: it may still be in free blocks of the disk and in memory",
                    "No: the snapshot keeps a list of deleted files",
                    "Only if Emil does not look",
                ],
                best: 'C',
                because: "Deleting a file forgets where it was. Its bytes stay until something else is written there, and \
                          memory is full of copies.",
            }),
            notes: Notes {
                minutes: 2,
                say: "The key is in the kitten image on purpose and opens nothing. Ask who has ever published an image of \
                      a machine they worked on.",
                wrong: "The search takes some seconds, as it reads every byte.",
            },
            ..Step::EMPTY
        },
        Step {
            name: "stranger",
            title: "An image from a stranger",
            story: "Frida finds a file on a stick in the car park. It looks like Anna's, but for a few bytes. Emil, \
                    meanwhile, looks whom his machine lets in.",
            watch: "What is refused, and what cannot be.",
            stage: BOTH,
            needs: &["anna@party"],
            acts: &[
                run(
                    "cp anna.catnap bad.catnap; printf purr | dd of=bad.catnap bs=1 seek=2000000 conv=notrunc status=none",
                ),
                run("CATNAP_HOME=frida catnap snapshot import bad.catnap").exits(6).named("bad"),
                run("CATNAP_HOME=emil catnap exec bella -- cat /root/.ssh/authorized_keys").named("trusted"),
                run("CATNAP_HOME=emil catnap rm --force bella"),
            ],
            claims: &[
                Claim {
                    says: "What was changed on the way is refused, and nothing of it stays.",
                    holds: |f| Some(!f.text("bad.error")?.is_empty()),
                },
                Claim {
                    says: "Of what was made by a stranger no digest says that it is harmless. Here a key is trusted that \
                           is not Emil's: whoever made the image can log in.",
                    holds: |f| Some(f.text("trusted.text")?.starts_with("ssh-ed25519")),
                },
            ],
            ask: Some(Question {
                text: "Which of these makes a stranger's image safe to start?",
                answers: [
                    "Its digest is right",
                    "It comes from a registry",
                    "It is small",
                    "Many people have downloaded it",
                    "None of these",
                ],
                best: 'E',
                because: "A digest says that it is what its maker made. Whether you trust the maker is another question; so \
                          run it away from your data, without your keys, and with no more network than it needs.",
            }),
            notes: Notes {
                minutes: 2,
                say: "Starting an image is running somebody's program, as root, with memory that already runs. It may do \
                      something from its first instruction on.",
                wrong: "Nothing: the refusal is the lesson. Exit code 6 means damaged.",
            },
            ..Step::EMPTY
        },
        Step {
            name: "scrub",
            title: "Scrub it first",
            story: "Anna does it again, and better: she has a copy made from which keys, logs and histories are removed, and \
                    the file with the password too.",
            watch: "What is left, when it is searched again.",
            stage: &["catnap restore anna@party -p {port}:80"],
            needs: &["anna@party"],
            makes: &["anna@public"],
            acts: &[
                run("catnap snapshot scrub anna@party anna@public --also /root/shop.conf --json").named("scrub"),
                run("catnap snapshot inspect --secrets anna@public").named("left"),
            ],
            claims: &[
                Claim {
                    says: "{scrub.secrets} secrets are left in the copy, and it is a {scrub.kind} snapshot: memory stays at \
                           home.",
                    holds: |f| Some(f.number("scrub.secrets")? == 0.0 && f.text("scrub.kind")? != "live"),
                },
                Claim {
                    says: "Neither the key nor the password is found any more.",
                    holds: |f| {
                        let left = f.text("left.text")?;
                        Some(!left.contains("private key") && !left.contains("password"))
                    },
                },
            ],
            figure: "{scrub.secrets} secrets are left",
            notes: Notes {
                minutes: 2,
                say: "A list finds what is where it usually is. The file with the password was Anna's own idea, so she had to \
                      name it. Best is an image that was made from a recipe and never had a secret.",
                wrong: "It boots a small machine to do so, which takes a few seconds.",
            },
            ..Step::EMPTY
        },
        Step {
            name: "recolour",
            title: "A kitten of another colour",
            story: "Frida gets the scrubbed file. Her machine boots, has a kitten of its own colour, and nobody's keys.",
            watch: "The third page: whose kitten is grey?",
            stage: &["catnap restore anna@party -p {port}:80"],
            needs: &["anna@party", "anna@public"],
            acts: &[
                run("catnap snapshot export anna@public public.catnap --yes"),
                run("CATNAP_HOME=frida catnap snapshot import public.catnap"),
                run("CATNAP_HOME=frida catnap restore anna@public --name carla -p {port3}:80 --set colour=grey"),
                run("CATNAP_HOME=frida catnap exec carla -- sh -c 'cat /root/.ssh/id_ed25519 /root/shop.conf 2>&1 || true'")
                    .named("nothing"),
            ],
            looks: &[At { name: "grey", port: "port3", path: "/" }],
            claims: &[
                Claim {
                    says: "Her kitten is grey.",
                    holds: |f| Some(f.text("grey.text")?.contains("class=\"grey\"")),
                },
                Claim {
                    says: "Neither key nor password came along.",
                    holds: |f| {
                        let nothing = f.text("nothing.text")?;
                        Some(!nothing.contains("PRIVATE KEY") && !nothing.contains("Tuna4Ever"))
                    },
                },
            ],
            notes: Notes {
                minutes: 1,
                say: "Shared once, changed by everybody for themselves: that is what images are for.",
                wrong: "The third port is taken: catnap lesson reset, and run --port with another one.",
            },
            ..Step::EMPTY
        },
    ],
};
