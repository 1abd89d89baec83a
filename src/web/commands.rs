//! Which command lines the page may have run: the verbs of the lesson, with options that name no files.

/// The most words of a command line, and the longest of them in bytes.
const MOST: usize = 24;
const LONGEST: usize = 128;

/// Options that take a value.
type Options = &'static [&'static str];
/// Options that take none.
type Flags = &'static [&'static str];

const SIZE: Options = &["--cpus", "--memory", "--flavor", "--max-cpus", "--max-memory"];

/// The verbs, as they begin, with their options.
const VERBS: &[(&[&str], &[Options], Flags)] = &[
    (&["run"], &[SIZE, &["--name", "-p", "--ephemeral"]], &[]),
    (&["start"], &[], &[]),
    (&["stop"], &[&["--time"]], &["--force"]),
    (&["rm"], &[], &["--force"]),
    (&["pause"], &[], &[]),
    (&["resume"], &[], &[]),
    (&["resize"], &[SIZE], &[]),
    (&["load"], &[&["--seconds", "--connections", "--path"]], &[]),
    (&["disk", "attach"], &[&["--ephemeral"]], &[]),
    (&["disk", "detach"], &[], &["--force"]),
    (&["snapshot", "create"], &[&["--mode"]], &["--at-doorbell"]),
    (&["snapshot", "verify"], &[], &[]),
    (&["snapshot", "inspect"], &[], &["--secrets"]),
    (&["snapshot", "scrub"], &[], &[]),
    (
        &["restore"],
        &[SIZE, &["--name", "--disk-size", "-p", "--ephemeral", "--set"]],
        &["--cold", "--replace", "--no-safety"],
    ),
    (&["clone"], &[SIZE, &["--count", "--disk-size", "-p"]], &[]),
];

/// Programs that may be run in a guest, behind `exec MACHINE --`: those of the lesson, to the letter.
const PROGRAMS: &[&[&str]] = &[
    &["sh", "-c", "echo kept >/root/note.txt; echo lent >/mnt/notes.txt; sync"],
    &["sh", "-c", "cat /root/note.txt /mnt/notes.txt"],
];

/// Refuses what is not among them, with the reason.
pub fn check(words: &[String]) -> Result<(), String> {
    if words.is_empty() || words.len() > MOST || words.iter().any(|word| word.is_empty() || word.len() > LONGEST) {
        return Err(format!("a command line has 1 to {MOST} words of 1 to {LONGEST} bytes"));
    }
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    if let ["exec", machine, "--", program @ ..] = &words[..] {
        return match is_name(machine) && PROGRAMS.contains(&program) {
            true => Ok(()),
            false => Err("only the lesson's programs are run in a guest from here".into()),
        };
    }
    let found = VERBS.iter().find(|(verb, ..)| words.starts_with(verb));
    let (verb, options, flags) = found.ok_or_else(|| format!("`{}` cannot be run from here", words[0]))?;
    let mut rest = words[verb.len()..].iter();
    while let Some(word) = rest.next() {
        if options.iter().any(|options| options.contains(word)) {
            let value = rest.next().ok_or_else(|| format!("{word} needs a value"))?;
            if !is_value(value) {
                return Err(format!("`{value}` is no value for {word} from here"));
            }
        } else if !flags.contains(word) && !is_name(word) {
            return Err(format!("`{word}` cannot be given to {} from here", verb.join(" ")));
        }
    }
    Ok(())
}

/// Whether a word can be a machine, a snapshot, a tag or a folder of the guest, and no file out here.
fn is_name(word: &str) -> bool {
    let known = |byte: u8| byte.is_ascii_alphanumeric() || b"@:._-".contains(&byte);
    word.starts_with(|first: char| first.is_ascii_alphanumeric())
        && word.bytes().all(known)
        && !word.ends_with(crate::archive::SUFFIX)
}

/// Whether a word can be an option's value.
fn is_value(word: &str) -> bool {
    !word.starts_with('-') && word.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"@:._-/?=".contains(&byte))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn checked(line: &str) -> bool {
        check(&line.split(' ').map(str::to_owned).collect::<Vec<_>>()).is_ok()
    }

    #[test]
    fn the_lessons_verbs_are_run_and_nothing_else() {
        for good in [
            "run kitten --name anna -p 8080:80 --ephemeral 64M:/mnt --max-cpus 4",
            "snapshot create anna --mode quiesced",
            "snapshot create anna@monday --mode crash --at-doorbell",
            "restore anna@monday --name anna-2 -p 8081:80 --cold",
            "restore sha256:0123abcd --replace --no-safety",
            "restore anna@monday --name anna-2 --set colour=grey",
            "snapshot inspect anna@monday --secrets",
            "snapshot scrub anna@monday anna@public",
            "clone anna@monday bella --count 3 -p 8082:80",
            "load anna --seconds 5 --path /work?n=1000",
            "resize anna --cpus 4 --memory 1G",
            "disk detach anna --force",
            "stop anna",
        ] {
            assert!(checked(good), "{good}");
        }
        for bad in [
            "",
            "monitor anna",
            "exec anna -- sh",
            "exec anna -- rm -rf /",
            "run kitten --kernel /etc/passwd",
            "run /tmp/x.catnap",
            "restore x.catnap",
            "snapshot",
            "snapshot export anna@a x",
            "snapshot rm anna@a",
            "snapshot scrub anna@a --also-from /etc/passwd",
            "snapshot inspect anna@a --find x",
            "run kitten --name",
            "run kitten --name --kernel",
            "start --help",
            "start -- anna",
            "start ../anna",
            "load anna --path /a;b",
            "start anna\nrm",
        ] {
            assert!(!checked(bad), "{bad}");
        }
        assert!(check(&vec!["a".into(); MOST + 1]).is_err());
        assert!(check(&["start".into(), "a".repeat(LONGEST + 1)]).is_err());
        let program = ["exec", "anna", "--"].into_iter().chain(PROGRAMS[1].iter().copied());
        assert!(check(&program.map(str::to_owned).collect::<Vec<_>>()).is_ok());
    }
}
