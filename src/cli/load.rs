//! `catnap load`: asks a machine's page for the same thing again and again, and counts the answers.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpStream};
use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use serde::Serialize;

use super::home::House;
use super::{Outcome, ui};
use crate::control::{Code, Failure};
use crate::spec::{Forward, Name};
use crate::sys::process;

/// The port of the guest that is meant when nobody says.
const PORT: u16 = 80;
/// How long one answer may take.
const PATIENCE: Duration = Duration::from_secs(30);
/// The longest head of an answer, in bytes.
const MAX_HEAD: usize = 16 << 10;
/// The longest answer, in bytes.
const MAX_BODY: u64 = 64 << 20;
/// How many latencies a connection keeps; more are counted but do not add to the percentiles.
const MAX_SAMPLES: usize = 100_000;
/// How often the count is shown.
const GLANCE: Duration = Duration::from_millis(250);

/// Put a machine's page under load, and count
#[derive(clap::Args)]
#[command(after_help = "\
Each connection sends one request after the other through the port that is forwarded to the guest's port 80 (or
--port), over the loopback only. `/work` keeps one vCPU busy for some milliseconds, so that more vCPUs show.

Examples:
  catnap load anna
  catnap load anna --seconds 5 --connections 8 --path '/work?n=200000'
  catnap load anna --json | jq .requests_per_second")]
pub struct Args {
    /// For how many seconds
    #[arg(short, long, value_name = "N", default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=3600))]
    seconds: u32,
    /// Over how many connections at one time
    #[arg(short, long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u16).range(1..=256))]
    connections: u16,
    /// What to ask for
    #[arg(long, default_value = "/work", value_parser = path)]
    path: String,
    /// The guest's port, which must be forwarded
    #[arg(long, default_value_t = PORT)]
    port: u16,
    /// Print what came of it as JSON
    #[arg(long)]
    json: bool,
    /// The machine
    #[arg(value_name = "MACHINE")]
    name: Name,
}

/// What came of it.
#[derive(Debug, Serialize)]
struct Measured {
    name: Name,
    path: String,
    connections: u16,
    seconds: f64,
    /// Answers of the kind 2xx.
    requests: u64,
    /// Other answers, and connections that broke.
    errors: u64,
    requests_per_second: f64,
    /// How long an answer took, in microseconds: the median, and what 99 of 100 were below.
    median_us: u64,
    p99_us: u64,
    bytes: u64,
}

/// What one connection, or all of them, came to.
#[derive(Debug, Default)]
struct Tally {
    requests: u64,
    errors: u64,
    bytes: u64,
    latencies: Vec<u32>,
    /// The first thing that went wrong.
    why: Option<String>,
}

/// Runs the verb.
pub fn run(args: Args) -> Outcome {
    process::catch_interrupts();
    let house = House::open()?;
    let machine = house.machine(&args.name)?;
    house.client(&args.name)?;
    let port = forwarded(&args, &machine.spec.forwards)?;
    let progress = ui::Progress::begin(format!("Asking {} for {}", args.name, args.path));
    let begun = Instant::now();
    let tally = drive(port, &args, || progress.say(format!("Asking {} for {}", args.name, args.path)))?;
    let seconds = begun.elapsed().as_secs_f64();
    drop(progress);
    if tally.requests == 0 {
        let why = tally.why.unwrap_or_else(|| "there was no answer in time".into());
        return Err(Failure::new(Code::Failed, format!("nothing was answered on port {port}: {why}"))
            .hint(format!("catnap logs {}", args.name)));
    }
    show(&args, tally, seconds)?;
    Ok(ExitCode::SUCCESS)
}

/// The port of this host that leads to the guest's.
fn forwarded(args: &Args, forwards: &[Forward]) -> Result<u16, Failure> {
    let found = forwards.iter().find(|forward| forward.guest == args.port).map(|forward| forward.host);
    found.ok_or_else(|| {
        let why = format!("no port of this host leads to port {} of {}", args.port, args.name);
        Failure::new(Code::Refused, why).hint(format!("catnap run or catnap restore with -p 8080:{}", args.port))
    })
}

fn show(args: &Args, mut tally: Tally, seconds: f64) -> Result<(), Failure> {
    tally.latencies.sort_unstable();
    let at = |part: usize| tally.latencies.get(tally.latencies.len() * part / 100).map_or(0, |us| u64::from(*us));
    let measured = Measured {
        name: args.name.clone(),
        path: args.path.clone(),
        connections: args.connections,
        seconds,
        requests: tally.requests,
        errors: tally.errors,
        requests_per_second: tally.requests as f64 / seconds,
        median_us: at(50),
        p99_us: at(99),
        bytes: tally.bytes,
    };
    if let Some(why) = tally.why {
        ui::warn(format!("{} requests failed; the first: {why}", measured.errors));
    }
    if args.json {
        return ui::json(&measured);
    }
    let milliseconds = |us: u64| us as f64 / 1000.0;
    ui::data(format!(
        "{:.1} requests per second ({} in {seconds:.1} s over {} connections; median {:.1} ms, 99 of 100 below {:.1} ms)\n",
        measured.requests_per_second,
        measured.requests,
        measured.connections,
        milliseconds(measured.median_us),
        milliseconds(measured.p99_us)
    ))
}

/// Keeps all connections busy for the time, or until Ctrl-C.
fn drive(port: u16, args: &Args, mut glance: impl FnMut()) -> Result<Tally, Failure> {
    let (over, all) = (AtomicBool::new(false), Mutex::new(Tally::default()));
    let deadline = Instant::now() + Duration::from_secs(args.seconds.into());
    thread::scope(|scope| {
        for _ in 0..args.connections {
            let work = || {
                let tally = keep_asking(port, &args.path, &over);
                all.lock().unwrap_or_else(std::sync::PoisonError::into_inner).add(tally);
            };
            let small = thread::Builder::new().name("load".into()).stack_size(128 * 1024);
            if let Err(error) = small.spawn_scoped(scope, work) {
                over.store(true, Ordering::Relaxed);
                return Err(Failure::while_doing("a thread for each connection", error));
            }
        }
        while Instant::now() < deadline && !process::interrupted() {
            thread::sleep(GLANCE.min(deadline.saturating_duration_since(Instant::now())));
            glance();
        }
        over.store(true, Ordering::Relaxed);
        Ok(())
    })?;
    Ok(all.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner))
}

impl Tally {
    fn add(&mut self, other: Tally) {
        self.requests += other.requests;
        self.errors += other.errors;
        self.bytes += other.bytes;
        self.latencies.extend(other.latencies);
        self.why = self.why.take().or(other.why);
    }
}

/// One connection's work; it connects again when the connection breaks.
fn keep_asking(port: u16, path: &str, over: &AtomicBool) -> Tally {
    let mut tally = Tally::default();
    let mut stream = None;
    while !over.load(Ordering::Relaxed) {
        let begun = Instant::now();
        let answered = match stream.take().map_or_else(|| connect(port), Ok) {
            Ok(mut open) => ask(&mut open, path).map(|bytes| (open, bytes)),
            Err(error) => Err(error),
        };
        match answered {
            Ok((open, (status, bytes))) => {
                stream = Some(open);
                tally.bytes += bytes;
                if (200..300).contains(&status) {
                    tally.requests += 1;
                    if tally.latencies.len() < MAX_SAMPLES {
                        tally.latencies.push(begun.elapsed().as_micros().min(u32::MAX.into()) as u32);
                    }
                } else {
                    tally.errors += 1;
                    tally.why.get_or_insert_with(|| format!("the answer is {status}"));
                }
            }
            Err(error) => {
                tally.errors += 1;
                tally.why.get_or_insert_with(|| error.to_string());
                // Nobody is helped by a thousand refusals a second.
                thread::sleep(Duration::from_millis(20));
            }
        }
    }
    tally
}

fn connect(port: u16) -> std::io::Result<TcpStream> {
    let stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port))?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// One request on a connection that stays; the status of the answer, and how many bytes it had.
fn ask(stream: &mut TcpStream, path: &str) -> std::io::Result<(u16, u64)> {
    let nonsense = |why: &str| std::io::Error::new(std::io::ErrorKind::InvalidData, why.to_owned());
    stream.write_all(format!("GET {path} HTTP/1.1\r\nHost: catnap\r\n\r\n").as_bytes())?;
    let mut bytes = Vec::new();
    let (head, status, body) = loop {
        let mut chunk = [0; 4096];
        let count = stream.read(&mut chunk)?;
        if count == 0 {
            return Err(nonsense("the connection was closed"));
        }
        bytes.extend_from_slice(&chunk[..count]);
        let mut headers = [httparse::EMPTY_HEADER; 64];
        let mut answer = httparse::Response::new(&mut headers);
        match answer.parse(&bytes) {
            Ok(httparse::Status::Complete(head)) => {
                let length = answer.headers.iter().find(|field| field.name.eq_ignore_ascii_case("content-length"));
                let length = length.and_then(|field| std::str::from_utf8(field.value).ok()?.trim().parse::<u64>().ok());
                let length = length.filter(|length| *length <= MAX_BODY);
                break (head, answer.code.unwrap_or(0), length.ok_or_else(|| nonsense("an answer of unknown length"))?);
            }
            Ok(httparse::Status::Partial) if bytes.len() < MAX_HEAD => {}
            _ => return Err(nonsense("what answers does not speak HTTP")),
        }
    };
    let here = (bytes.len() - head) as u64;
    let missing = body.checked_sub(here).ok_or_else(|| nonsense("an answer is longer than it says"))?;
    if std::io::copy(&mut stream.take(missing), &mut std::io::sink())? < missing {
        return Err(nonsense("the connection was closed in the middle of an answer"));
    }
    Ok((status, head as u64 + body))
}

/// A path that makes one line of a request.
fn path(text: &str) -> Result<String, String> {
    let sound = text.starts_with('/') && text.len() <= 2048 && text.bytes().all(|byte| byte.is_ascii_graphic());
    if sound { Ok(text.into()) } else { Err("a path begins with / and has no spaces".into()) }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    /// Answers each request on one connection with the next of `answers`, then closes.
    fn serve(answers: Vec<String>) -> u16 {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let port = listener.local_addr().unwrap().port();
        thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            for answer in answers {
                let mut request = Vec::new();
                while !request.ends_with(b"\r\n\r\n") {
                    let mut byte = [0];
                    stream.read_exact(&mut byte).unwrap();
                    request.extend(byte);
                }
                stream.write_all(answer.as_bytes()).unwrap();
            }
        });
        port
    }

    #[test]
    fn answers_are_read_to_their_end_on_one_connection() {
        let long = "x".repeat(10_000);
        let port = serve(vec![
            format!("HTTP/1.1 200 OK\r\nContent-Length: 10000\r\n\r\n{long}"),
            "HTTP/1.1 404 No\r\ncontent-length: 0\r\n\r\n".into(),
            "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nabc".into(),
        ]);
        let mut stream = connect(port).unwrap();
        assert_eq!(ask(&mut stream, "/").unwrap().0, 200);
        assert_eq!(ask(&mut stream, "/").unwrap().0, 404);
        assert!(ask(&mut stream, "/").unwrap_err().to_string().contains("closed"));
    }

    #[test]
    fn answers_of_unknown_or_absurd_length_are_refused() {
        for answer in [
            "HTTP/1.1 200 OK\r\n\r\n".to_string(),
            "HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\n".into(),
            "HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nabc".into(),
            "SSH-2.0-x\r\n\r\n".into(),
            format!("HTTP/1.1 200 OK\r\nX: {}\r\n", "y".repeat(2 * MAX_HEAD)),
        ] {
            let mut stream = connect(serve(vec![answer.clone()])).unwrap();
            assert!(ask(&mut stream, "/").is_err(), "{}", &answer[..answer.len().min(60)]);
        }
    }

    #[test]
    fn a_path_cannot_carry_another_request() {
        assert_eq!(path("/work?n=7"), Ok("/work?n=7".into()));
        for bad in ["", "work", "/a b", "/a\r\nX: y", "/\u{e9}"] {
            assert!(path(bad).is_err(), "{bad:?}");
        }
    }
}
