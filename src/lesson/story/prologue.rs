//! Prologue: a machine to tell a story with.

use crate::lesson::{At, Chapter, Claim, Notes, Question, Step, run};

pub const CHAPTER: Chapter = Chapter {
    name: "prologue",
    title: "A machine for Anna",
    aim: "See that a machine is a process of this host, with memory, a disk, and a page to look at.",
    strike: &[],
    steps: &[
        Step {
            name: "doctor",
            title: "Can this host run machines?",
            story: "Anna wants a small machine of her own. Before she asks for one, she asks whether this host can run it.",
            watch: "The first line: KVM is what makes a guest run on the real CPU.",
            acts: &[run("catnap doctor").named("doctor")],
            claims: &[Claim {
                says: "This host has a KVM that is fit for Linux.",
                holds: |f| Some(f.text("doctor.text")?.lines().next()?.starts_with("ok")),
            }],
            notes: Notes {
                minutes: 1,
                say: "A hypervisor is a program that lets another operating system run on this CPU. Ours is a process \
                      called catnap, and the kernel's half of the work is /dev/kvm.",
                wrong: "No /dev/kvm, or no right to it: doctor says which, and what to do. Where nothing helps, \
                        scripts/lesson runs everything in the lab, an emulated host: slower, and the same in all else.",
            },
            ..Step::EMPTY
        },
        Step {
            name: "boot",
            title: "Boot it",
            story: "One command makes a machine from an image and boots it. It serves a page with a kitten on it, a guest \
                    book, and a counter that counts every half second for as long as the machine lives.",
            watch: "Open {page} in a browser and find the counter. It will be with us for the whole lesson.",
            acts: &[
                run("catnap run kitten --name anna --memory 256M --max-cpus 2 --max-memory 512M -p {port}:80")
                    .named("boot"),
                run("catnap ps"),
            ],
            looks: &[At { name: "page_shown", port: "port", path: "/" }],
            claims: &[
                Claim {
                    says: "From the command to a page that answers took {boot.seconds:s}.",
                    holds: |f| Some(f.number("boot.seconds")? < 120.0),
                },
                Claim {
                    says: "There is a kitten on it.",
                    holds: |f| {
                        let page = f.text("page_shown.text")?;
                        Some(page.contains("<svg") && page.to_lowercase().contains("kitten"))
                    },
                },
            ],
            figure: "{boot.seconds:s} to boot",
            notes: Notes {
                minutes: 2,
                say: "--max-cpus and --max-memory are the envelope: how big this machine can ever get. Remember them for \
                      the chapter on scaling. Everybody finds the counter on the page before we go on.",
                wrong: "The port is taken: catnap lesson reset, then catnap lesson run --port 9080. Other laptops cannot \
                        reach the page, which listens on the loopback only: show it on the projector.",
            },
            ..Step::EMPTY
        },
        Step {
            name: "golden",
            title: "The first nap",
            story: "Anna keeps the machine as it is now, to come back to. That is a snapshot: disk, memory and all. Every \
                    chapter of this lesson begins from this one.",
            watch: "The counter: did you see it stop?",
            cast: &["anna"],
            makes: &["anna@golden"],
            acts: &[
                run("catnap snapshot create anna@golden -m 'the lesson begins here' --json").named("golden"),
                run("catnap snapshot ls"),
            ],
            claims: &[
                Claim {
                    says: "It is a {golden.kind} snapshot, of memory and disk.",
                    holds: |f| Some(f.text("golden.kind")? == "live"),
                },
                Claim {
                    says: "{golden.bytes_written:mib} of its memory were written; the rest was zeros.",
                    holds: |f| {
                        let written = f.number("golden.bytes_written")?;
                        Some(written > 0.0 && written < 256.0 * 1024.0 * 1024.0)
                    },
                },
            ],
            ask: Some(Question {
                text: "What is in this snapshot?",
                answers: [
                    "The files on the disk",
                    "The files, and the programs that run, with their memory",
                    "Only what changed since the machine was made",
                    "A list of the commands that made the machine",
                    "A picture of the screen",
                ],
                best: 'B',
                because: "Disk, memory and the state of the virtual hardware, all of one instant. On the disk it shares \
                          what it can with its parents, so C is how it is stored, and not what it is.",
            }),
            notes: Notes {
                minutes: 1,
                say: "Cards up before you press Enter. This is the golden state: whatever breaks from now on, r brings \
                      everybody back to the beginning of the step in a second.",
                wrong: "Too little room on the disk: catnap doctor says how much there is.",
            },
            ..Step::EMPTY
        },
    ],
};
