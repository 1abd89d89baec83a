//! Transient: a disk in the host's memory, and why it is not to be relied upon.

use crate::lesson::When::{Real, Simulated};
use crate::lesson::{At, Chapter, Claim, Notes, Question, Step, run};

/// A machine with both notes on it.
const NOTED: &[&str] = &[
    "catnap restore anna@golden --ephemeral 64M:/mnt -p {port}:80",
    "catnap exec anna -- sh -c 'echo feed the kitten > /root/note; echo buy fish > /mnt/notes.txt; sync'",
];

pub const CHAPTER: Chapter = Chapter {
    name: "transient",
    title: "Transient storage",
    aim: "Know that transient storage is not to be relied upon, and what that means for whoever uses it.",
    strike: &[],
    steps: &[
        Step {
            name: "notes",
            title: "Two notes",
            story: "Anna's machine has a second disk now, fast and free of charge: 64 MiB of the host's own memory, on /mnt. \
                    She writes one note on each disk.",
            watch: "The page shows the note that is on /mnt.",
            needs: &["anna@golden"],
            acts: &[
                run("catnap restore anna@golden --ephemeral 64M:/mnt -p {port}:80"),
                run(
                    "catnap exec anna -- sh -c 'echo feed the kitten > /root/note; echo buy fish > /mnt/notes.txt; sync'",
                ),
                run("catnap exec anna -- df -m / /mnt").named("df"),
                run("catnap exec anna -- cat /root/note /mnt/notes.txt").named("notes"),
            ],
            looks: &[At { name: "shown", port: "port", path: "/" }],
            claims: &[
                Claim {
                    says: "Both notes are there: {notes.text}",
                    holds: |f| Some(f.text("notes.text")? == "feed the kitten\nbuy fish"),
                },
                Claim {
                    says: "/mnt is a disk of its own, and the page shows what is on it.",
                    holds: |f| Some(f.text("df.text")?.contains("/mnt") && f.text("shown.text")?.contains("buy fish")),
                },
            ],
            notes: Notes {
                minutes: 2,
                say: "Clouds call it ephemeral, instance store, scratch or temporary disk. It is a disk of the very host \
                      that the machine happens to run on.",
                wrong: "No tmpfs with room: doctor and the error say which to make.",
            },
            ..Step::EMPTY
        },
        Step {
            name: "snapshot",
            title: "A snapshot, to be safe",
            story: "It is Friday. Anna takes a snapshot of everything, and goes home with a good feeling.",
            watch: "What does the snapshot say that it holds?",
            stage: NOTED,
            needs: &["anna@golden"],
            cast: &["anna"],
            makes: &["anna@friday"],
            acts: &[
                run("catnap snapshot create anna@friday --json").named("friday"),
                run("catnap snapshot inspect anna@friday --json").named("box"),
                run("catnap exec anna -- cat /mnt/notes.txt").named("still"),
            ],
            claims: &[
                Claim {
                    says: "One disk is in it, the root disk. Of the other it says only that there was one.",
                    holds: |f| {
                        let manifest = f.get("box.list.0.manifest").or(f.get("box.list.0"))?;
                        Some(manifest.get("disks")?.as_array()?.len() == 1)
                    },
                },
                Claim {
                    says: "The note on /mnt is where it was, for now: {still.text}",
                    holds: |f| Some(f.text("still.text")? == "buy fish"),
                },
            ],
            ask: Some(Question {
                text: "The host loses its power. What does the machine have that is restored from this snapshot?",
                answers: [
                    "Both notes",
                    "The note on the root disk",
                    "The note on /mnt",
                    "Neither",
                    "That depends on the filesystem",
                ],
                best: 'B',
                because: "Let us see.",
            }),
            notes: Notes {
                minutes: 1,
                say: "Cards up, and do not tell. Ask for reasons.",
                wrong: "Somebody says that memory is in a live snapshot, and the disk is in memory. In the host's memory, \
                        and the snapshot has the guest's.",
            },
            ..Step::EMPTY
        },
        Step {
            name: "death",
            title: "The host dies",
            story: "In the night, somebody trips over a cable.",
            watch: "What is left of the machine, and what is not.",
            stage: NOTED,
            needs: &["anna@golden", "anna@friday"],
            cast: &["anna"],
            acts: &[
                run("scripts/lab powercut").when(Real),
                run("catnap inspect anna").named("inspect").when(Simulated),
                run("kill -KILL {inspect.list.0.pid}; sleep 1").when(Simulated),
                run("rm {inspect.list.0.monitor.ephemeral.0.file}").when(Simulated),
                run("catnap ps --json").named("ps"),
            ],
            claims: &[
                Claim {
                    says: "The death of the host was {host.how}.",
                    holds: |f| match f.get("host.real")?.as_bool()? {
                        true => Some(!f.same("host.before", "host.now")?),
                        false => Some(true),
                    },
                },
                Claim {
                    says: "Of Anna's machine `catnap ps` says: {ps.list.0.state}.",
                    holds: |f| Some(["died", "lost"].contains(&f.text("ps.list.0.state")?)),
                },
            ],
            figure: "Anna's machine: {ps.list.0.state}",
            notes: Notes {
                minutes: 1,
                say: "In the lab the power of the whole host is cut, for real. On your own laptop we only kill the machine's \
                      process and remove its file in memory, and we say so: it is what a power cut would leave.",
                wrong: "In the lab the lesson itself goes down and comes back; wait for it.",
            },
            ..Step::EMPTY
        },
        Step {
            name: "replacement",
            title: "The replacement",
            story: "On Saturday morning Anna wakes Friday's snapshot in the place of what was lost.",
            watch: "How many notes are there? And what does the page say?",
            needs: &["anna@friday"],
            acts: &[
                run("catnap restore anna@friday --replace --no-safety -p {port}:80 --json").named("replaced"),
                run("catnap exec anna -- sh -c 'cat /root/note /mnt/notes.txt 2>&1 || true'").named("left"),
                run("catnap exec anna -- df -m /mnt").named("blank"),
            ],
            looks: &[At { name: "told", port: "port", path: "/" }],
            claims: &[
                Claim {
                    says: "The note on the root disk is there.",
                    holds: |f| Some(f.text("left.text")?.contains("feed the kitten")),
                },
                Claim {
                    says: "The note on /mnt is gone. Oh woes.",
                    holds: |f| Some(!f.text("left.text")?.contains("buy fish")),
                },
                Claim {
                    says: "The disk is there again, and blank; the page says that the notes are lost.",
                    holds: |f| {
                        let told = f.text("told.text")?;
                        Some(f.text("blank.text")?.contains("/mnt") && told.contains("notes are lost"))
                    },
                },
            ],
            figure: "1 of 2 notes",
            ask: Some(Question {
                text: "What is such a disk good for?",
                answers: [
                    "Nothing",
                    "The database, because it is fast",
                    "What can be made again: caches, scratch files, swap",
                    "Backups of the root disk",
                    "Passwords, because they vanish",
                ],
                best: 'C',
                because: "Use it for what you would not miss. And E is tempting, but what was read into memory is in a live \
                          snapshot all the same.",
            }),
            notes: Notes {
                minutes: 2,
                say: "Oh woes. Nobody did anything wrong: the disk did what it says it does. Who of you has something on \
                      such a disk today?",
                wrong: "The machine is still busy: catnap ps says with what.",
            },
            ..Step::EMPTY
        },
    ],
};
