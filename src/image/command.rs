//! Running the programs of the distribution that we need.

use std::io;
use std::os::unix::process::CommandExt;
use std::process::{Command, Output, Stdio};

use super::Error;

/// How much of a failed program's words is shown.
const SHOWN: usize = 400;

/// Runs the command to its end and gives what it said on standard output. `package` is where to get it.
pub fn run(command: &mut Command, package: &'static str) -> Result<Vec<u8>, Error> {
    let output = output(command, package)?;
    match output.status.success() {
        true => Ok(output.stdout),
        false => Err(failed(command, &output.stderr, &output.status.to_string())),
    }
}

/// Runs the command to its end, and leaves it to the caller what a failure is.
pub fn output(command: &mut Command, package: &'static str) -> Result<Output, Error> {
    // SAFETY: between fork and exec only calls that are safe in a signal handler are allowed; prctl is a bare
    // system call, and makes the kernel end the program when we end before it.
    unsafe {
        command.pre_exec(|| match libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) {
            -1 => Err(io::Error::last_os_error()),
            _ => Ok(()),
        });
    }
    // Messages are shown to people and some are read: in plain English, whatever the locale is.
    command.env("LC_ALL", "C").stdin(Stdio::null()).output().map_err(|error| {
        let program = command.get_program().to_string_lossy().into_owned();
        match error.kind() {
            io::ErrorKind::NotFound => Error::Missing { program, package },
            _ => Error::Failed { command: program, said: error.to_string() },
        }
    })
}

/// The error of a command that went wrong: the end of what it said, or how it ended when it said nothing.
pub fn failed(command: &Command, stderr: &[u8], ended: &str) -> Error {
    let words = [command.get_program()].into_iter().chain(command.get_args());
    let command = words.map(|word| word.to_string_lossy()).collect::<Vec<_>>().join(" ");
    let said = String::from_utf8_lossy(stderr);
    let said = said.trim();
    let start = said.len().saturating_sub(SHOWN);
    let start = (start..said.len()).find(|at| said.is_char_boundary(*at)).unwrap_or(0);
    Error::Failed { command, said: if said.is_empty() { ended.into() } else { said[start..].into() } }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_program_names_its_package_and_a_failed_one_its_words() {
        let missing = run(&mut Command::new("no-such-program"), "e2fsprogs").unwrap_err();
        assert_eq!(missing.to_string(), "`no-such-program` is missing: install the package e2fsprogs");
        let failed = run(Command::new("sh").args(["-c", "echo so sorry >&2; exit 3"]), "dash").unwrap_err();
        assert!(failed.to_string().ends_with("failed: so sorry"), "{failed}");
        let silent = run(&mut Command::new("false"), "coreutils").unwrap_err();
        assert!(silent.to_string().ends_with("exit status: 1"), "{silent}");
    }
}
