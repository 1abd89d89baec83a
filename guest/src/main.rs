//! `catnap-guest`: PID 1 of a guest; anywhere else the agent alone, its client, or the kitten site alone.

use std::process::ExitCode;

use catnap_guest::agent::Agent;
use catnap_guest::client;
use catnap_guest::init;
use catnap_guest::protocol::{Reply, Request};
use catnap_guest::site;
use catnap_guest::socket::{Address, Listener};

const USAGE: &str = "\
usage: catnap-guest agent  AT                     answer requests to run programs and to forward ports
       catnap-guest exec   AT [--tty] -- CMD...   run a program where an agent is
       catnap-guest status AT                     what an agent says of its machine, as JSON
       catnap-guest ask    AT REQUEST             send a request in JSON, print the reply
       catnap-guest site   ADDR:PORT FOLDER       serve the kitten page, with its guest book in FOLDER

AT is --tcp ADDR:PORT or --vsock CID:PORT. As PID 1 it is a guest's init, and takes no arguments.";

/// What docker's exec returns when its own part fails.
const UNREACHABLE: u8 = 125;

fn main() -> ExitCode {
    if std::process::id() == 1 {
        init::run();
    }
    let words: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let parsed = match words.as_slice() {
        ["agent", kind, at] => address(kind, at).map(agent),
        ["exec", kind, at, "--tty", "--", argv @ ..] => address(kind, at).map(|at| exec(at, argv, true)),
        ["exec", kind, at, "--", argv @ ..] => address(kind, at).map(|at| exec(at, argv, false)),
        ["status", kind, at] => address(kind, at).map(status),
        ["ask", kind, at, request] => address(kind, at).map(|at| ask(at, request)),
        ["site", at, folder] => address("--tcp", at).map(|at| serve_site(at, folder)),
        _ => None,
    };
    parsed.unwrap_or_else(|| {
        eprintln!("{USAGE}");
        ExitCode::from(2)
    })
}

fn address(kind: &str, at: &str) -> Option<Address> {
    match kind {
        "--tcp" => at.parse().ok().map(Address::Tcp),
        "--vsock" => {
            at.split_once(':').and_then(|(cid, port)| Some(Address::Vsock(cid.parse().ok()?, port.parse().ok()?)))
        }
        _ => None,
    }
}

fn agent(at: Address) -> ExitCode {
    failed(Listener::bind(at).and_then(|listener| Agent::new(None).serve(&listener)), 1)
}

fn exec(at: Address, argv: &[&str], tty: bool) -> ExitCode {
    match client::exec(at, argv.iter().map(|word| word.to_string()).collect(), tty) {
        Ok(code) => ExitCode::from(code),
        Err(error) => failed(Err(error), UNREACHABLE),
    }
}

fn status(at: Address) -> ExitCode {
    match client::ask(at, &Request::Status) {
        Ok(Reply::Status(status)) => print(&status),
        Ok(other) => failed(Err(std::io::Error::other(format!("the agent says {other:?}"))), 1),
        Err(error) => failed(Err(error), UNREACHABLE),
    }
}

fn ask(at: Address, request: &str) -> ExitCode {
    let reply = serde_json::from_str(request).map_err(Into::into).and_then(|request| client::ask(at, &request));
    match reply {
        Ok(reply @ Reply::Error(_)) => {
            print(&reply);
            ExitCode::FAILURE
        }
        Ok(reply) => print(&reply),
        Err(error) => failed(Err(error), UNREACHABLE),
    }
}

fn print(value: &impl serde::Serialize) -> ExitCode {
    match serde_json::to_string(value) {
        Ok(text) => {
            println!("{text}");
            ExitCode::SUCCESS
        }
        Err(error) => failed(Err(error.into()), 1),
    }
}

fn serve_site(at: Address, folder: &str) -> ExitCode {
    failed(site::serve_alone(at, folder.as_ref()), 1)
}

fn failed(result: std::io::Result<()>, code: u8) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("catnap-guest: {error}");
            ExitCode::from(code)
        }
    }
}
