//! The agent as the monitor meets it, over loopback in place of vsock.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use catnap_guest::agent::Agent;
use catnap_guest::protocol::{Exec, Frame, MAX_FRAME, MAX_LINE, Reply, Request, read_line, write_line};
use catnap_guest::socket::{Address, Listener};

/// Longer than anything here takes, also on a machine that is busy with other things.
const PATIENCE: Duration = Duration::from_secs(60);

fn agent() -> SocketAddr {
    let listener = Listener::bind(Address::Tcp(([127, 0, 0, 1], 0).into())).unwrap();
    let at = ([127, 0, 0, 1], listener.port().unwrap()).into();
    thread::spawn(move || Agent::new(None).serve(&listener));
    at
}

fn request(agent: SocketAddr, request: &Request) -> TcpStream {
    let mut stream = TcpStream::connect(agent).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.set_write_timeout(Some(PATIENCE)).unwrap();
    write_line(&mut stream, request).unwrap();
    stream
}

fn exec(agent: SocketAddr, argv: &[&str]) -> TcpStream {
    exec_with(agent, Exec { argv: argv.iter().map(|word| word.to_string()).collect(), ..Exec::default() })
}

fn exec_with(agent: SocketAddr, exec: Exec) -> TcpStream {
    request(agent, &Request::Exec(exec))
}

/// Everything until the last frame: standard output, standard error, and that frame.
fn collect(stream: &mut TcpStream) -> (Vec<u8>, Vec<u8>, Frame) {
    let (mut out, mut err) = (Vec::new(), Vec::new());
    loop {
        match Frame::read(stream).unwrap().expect("the connection ended without a last frame") {
            Frame::Stdout(bytes) => out.extend(bytes),
            Frame::Stderr(bytes) => err.extend(bytes),
            last => return (out, err, last),
        }
    }
}

fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let end = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < end, "{what} never came true");
        thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn streams_are_kept_apart_and_the_code_is_passed_on() {
    let agent = agent();
    let mut stream = exec(agent, &["sh", "-c", "cat; echo oh >&2; exit 42"]);
    Frame::Stdin(b"meow".to_vec()).write(&mut stream).unwrap();
    Frame::Stdin(b" purr".to_vec()).write(&mut stream).unwrap();
    Frame::Stdin(vec![]).write(&mut stream).unwrap();
    assert_eq!(collect(&mut stream), (b"meow purr".to_vec(), b"oh\n".to_vec(), Frame::Exit(42)));

    let mut stream = exec(agent, &["sh", "-c", "kill -TERM $$"]);
    assert_eq!(collect(&mut stream).2, Frame::Exit(128 + 15));
}

#[test]
fn what_cannot_be_started_fails_as_in_docker() {
    let agent = agent();
    let code = |argv: &[&str]| match collect(&mut exec(agent, argv)).2 {
        Frame::Failed(code, why) => (code, why),
        other => panic!("{other:?}"),
    };
    assert_eq!(code(&["no-such-program"]), (127, "no-such-program: not found".into()));
    assert_eq!(code(&["/etc"]).0, 126);
    assert_eq!(code(&[]).0, 126);
    assert_eq!(code(&["a\0b"]).0, 126);
    let missing = Exec { argv: vec!["true".into()], cwd: Some("/no/such/folder".into()), ..Exec::default() };
    assert!(matches!(collect(&mut exec_with(agent, missing)).2, Frame::Failed(126, _)));
}

#[test]
fn megabytes_pass_unharmed_in_both_directions_at_once() {
    let mut stream = exec(agent(), &["cat"]);
    let sent: Vec<u8> = (0..3_000_000u32).map(|i| ((i * 31) >> 5) as u8).collect();
    let (mut writer, copy) = (stream.try_clone().unwrap(), sent.clone());
    let feeding = thread::spawn(move || {
        copy.chunks(MAX_FRAME).for_each(|chunk| Frame::Stdin(chunk.to_vec()).write(&mut writer).unwrap());
        Frame::Stdin(vec![]).write(&mut writer).unwrap();
    });
    let (out, _, last) = collect(&mut stream);
    feeding.join().unwrap();
    assert!(out == sent && last == Frame::Exit(0));
}

#[test]
fn environment_and_folder_are_as_asked() {
    let exec = Exec {
        argv: vec!["sh".into(), "-c".into(), "echo $COLOUR; pwd".into()],
        env: vec![("COLOUR".into(), "ginger".into()), ("BAD=NAME".into(), "x".into())],
        cwd: Some("/usr".into()),
        tty: None,
    };
    assert_eq!(collect(&mut exec_with(agent(), exec)).0, b"ginger\n/usr\n");
}

#[test]
fn a_terminal_has_a_size_that_can_change_and_keys_that_interrupt() {
    // A shell that waits for a program lets that decide what an interrupt means, so at the end none waits.
    let script = "stty size; read x; stty size; test -t 0 && test -t 1 && test -t 2 && echo ready; exec sleep 1000";
    let argv = ["sh", "-c", script];
    let argv = argv.iter().map(|word| word.to_string()).collect();
    let mut stream = exec_with(agent(), Exec { argv, tty: Some((33, 101)), ..Exec::default() });
    let mut seen = String::new();
    let mut read_until = |stream: &mut TcpStream, text: &str| {
        while !seen.contains(text) {
            match Frame::read(stream).unwrap() {
                Some(Frame::Stdout(bytes)) => seen.push_str(&String::from_utf8_lossy(&bytes)),
                other => panic!("{other:?} before {text:?}, after {seen:?}"),
            }
        }
    };
    read_until(&mut stream, "33 101\r\n");
    Frame::Resize(50, 120).write(&mut stream).unwrap();
    Frame::Stdin(b"\n".to_vec()).write(&mut stream).unwrap();
    read_until(&mut stream, "50 120\r\nready\r\n");
    // Ctrl-C, which the terminal turns into SIGINT.
    Frame::Stdin(vec![3]).write(&mut stream).unwrap();
    assert_eq!(collect(&mut stream).2, Frame::Exit(128 + 2));
}

#[test]
fn signals_reach_the_whole_group() {
    let mut stream =
        exec(agent(), &["sh", "-c", "trap 'echo caught; exit 9' USR1; echo ready; while :; do sleep 0.05; done"]);
    assert_eq!(Frame::read(&mut stream).unwrap(), Some(Frame::Stdout(b"ready\n".to_vec())));
    Frame::Signal(10).write(&mut stream).unwrap();
    let (out, _, last) = collect(&mut stream);
    assert_eq!((out, last), (b"caught\n".to_vec(), Frame::Exit(9)));
}

#[test]
fn a_broken_connection_kills_the_program_and_its_children() {
    let agent = agent();
    for tty in [None, Some((24, 80))] {
        let argv = ["sh", "-c", "sleep 1000 & echo $! $$; wait"].iter().map(|word| word.to_string()).collect();
        let mut stream = exec_with(agent, Exec { argv, tty, ..Exec::default() });
        let Some(Frame::Stdout(line)) = Frame::read(&mut stream).unwrap() else { panic!("no output") };
        let line = String::from_utf8(line).unwrap();
        drop(stream);
        for pid in line.split_whitespace() {
            wait_until("the program's end", || {
                let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
                stat.is_empty() || stat.contains(") Z ")
            });
        }
    }
}

#[test]
fn the_end_is_told_while_a_child_in_the_background_keeps_the_pipe() {
    let mut stream = exec(agent(), &["sh", "-c", "sleep 1000 & echo $!; exit 5"]);
    let (out, _, last) = collect(&mut stream);
    assert_eq!(last, Frame::Exit(5));
    let pid = String::from_utf8(out).unwrap().trim().to_string();
    assert!(std::process::Command::new("kill").arg(pid).status().unwrap().success());
}

#[test]
fn a_monitor_that_does_not_read_stops_the_program_and_can_still_leave() {
    let agent = agent();
    let mut stream = exec(agent, &["sh", "-c", "echo $$; exec yes"]);
    let Some(Frame::Stdout(line)) = Frame::read(&mut stream).unwrap() else { panic!("no output") };
    let pid = String::from_utf8_lossy(&line).lines().next().unwrap().to_string();
    // `yes` sleeps once all buffers are full.
    wait_until("a full pipe", || std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap().contains(") S "));
    drop(stream);
    wait_until("the program's end", || !std::path::Path::new(&format!("/proc/{pid}")).exists());
}

#[test]
fn nonsense_ends_the_connection_and_nothing_else() {
    let agent = agent();
    let long = [b"x".repeat(MAX_LINE + 10), b"\n".to_vec()].concat();
    for line in [&b"{}\n"[..], b"\xff\xfe\n", b"{\"op\":\"explode\"}\n", &long] {
        let mut stream = TcpStream::connect(agent).unwrap();
        let _ = stream.write_all(line);
        assert!(matches!(stream.read(&mut [0; 16]), Ok(0) | Err(_)));
    }
    let mut stream = exec(agent, &["cat"]);
    stream.write_all(&[0, 255, 255, 255, 255]).unwrap();
    assert!(matches!(Frame::read(&mut stream), Ok(None) | Err(_)));
    let status: Reply = read_line(&mut request(agent, &Request::Status)).unwrap();
    assert!(matches!(status, Reply::Status(status) if status.cpus > 0 && status.memory_bytes > 0));
}

#[test]
fn an_agent_that_is_not_init_leaves_the_machine_alone() {
    let agent = agent();
    for refused in [Request::Freeze { seconds: 1 }, Request::Thaw, Request::Shutdown { reboot: false }] {
        let reply: Reply = read_line(&mut request(agent, &refused)).unwrap();
        assert!(matches!(reply, Reply::Error(_)), "{refused:?}");
    }
}

/// A server that sends back what it is sent, and ends when its client does.
fn echo_server() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            thread::Builder::new()
                .stack_size(64 << 10)
                .spawn(move || {
                    let mut buffer = [0; 4096];
                    while let Ok(n @ 1..) = stream.read(&mut buffer) {
                        if stream.write_all(&buffer[..n]).is_err() {
                            return;
                        }
                    }
                    let _ = stream.write_all(b"bye");
                })
                .unwrap();
        }
    });
    port
}

#[test]
fn a_forward_carries_bytes_and_half_closes_in_both_directions() {
    let (agent, port) = (agent(), echo_server());
    let mut stream = TcpStream::connect(agent).unwrap();
    // The first bytes travel in the same packet as the request.
    let mut first = Vec::new();
    write_line(&mut first, &Request::Forward { port }).unwrap();
    first.extend(b"hello ");
    stream.write_all(&first).unwrap();
    stream.write_all(b"kitten").unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    let mut back = String::new();
    stream.read_to_string(&mut back).unwrap();
    assert_eq!(back, "hello kittenbye");

    // And the other way: the server ends first and still hears its client.
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut client = request(agent, &Request::Forward { port: listener.local_addr().unwrap().port() });
    let (mut server, _) = listener.accept().unwrap();
    server.write_all(b"first").unwrap();
    server.shutdown(Shutdown::Write).unwrap();
    let mut heard = String::new();
    client.read_to_string(&mut heard).unwrap();
    client.write_all(b"still here").unwrap();
    drop(client);
    let mut answer = String::new();
    server.read_to_string(&mut answer).unwrap();
    assert_eq!((heard.as_str(), answer.as_str()), ("first", "still here"));
}

#[test]
fn a_forward_to_nobody_is_reset() {
    let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let mut stream = request(agent(), &Request::Forward { port: free });
    assert_eq!(stream.read(&mut [0; 1]).unwrap_err().kind(), std::io::ErrorKind::ConnectionReset);
}

#[test]
fn a_thousand_forwards_live_side_by_side() {
    // This process holds four descriptors for each of them.
    nix::sys::resource::setrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE, 16384, 16384)
        .or_else(|_| {
            let (_, hard) = nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE)?;
            nix::sys::resource::setrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE, hard, hard)
        })
        .unwrap();
    let (agent, port) = (agent(), echo_server());
    let mut streams: Vec<TcpStream> = (0..1000).map(|_| request(agent, &Request::Forward { port })).collect();
    for (number, stream) in streams.iter_mut().enumerate() {
        stream.write_all(format!("{number:04}").as_bytes()).unwrap();
    }
    for (number, stream) in streams.iter_mut().enumerate() {
        let mut back = [0; 4];
        stream.read_exact(&mut back).unwrap();
        assert_eq!(back, format!("{number:04}").as_bytes());
    }
}

#[test]
fn readers_that_sleep_do_not_hold_up_others_and_lose_nothing() {
    const SIZE: usize = 8 << 20;
    let agent = agent();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    // Everybody is sent more than any buffer holds.
    thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            thread::spawn(move || stream.write_all(&vec![7; SIZE]));
        }
    });
    let mut sleepers: Vec<TcpStream> = (0..20).map(|_| request(agent, &Request::Forward { port })).collect();
    let mut awake = Vec::new();
    request(agent, &Request::Forward { port }).read_to_end(&mut awake).unwrap();
    assert_eq!(awake.len(), SIZE);
    for sleeper in &mut sleepers {
        let mut late = Vec::new();
        sleeper.read_to_end(&mut late).unwrap();
        assert!(late.len() == SIZE && late.iter().all(|byte| *byte == 7));
    }
}

#[test]
fn more_programs_than_there_is_room_for_are_turned_away_and_room_comes_back() {
    let agent = agent();
    let mut running: Vec<TcpStream> = (0..64).map(|_| exec(agent, &["sh", "-c", "echo up; exec sleep 1000"])).collect();
    for stream in &mut running {
        assert_eq!(Frame::read(stream).unwrap(), Some(Frame::Stdout(b"up\n".to_vec())));
    }
    assert!(matches!(collect(&mut exec(agent, &["true"])).2, Frame::Failed(126, _)));
    let status: Reply = read_line(&mut request(agent, &Request::Status)).unwrap();
    assert!(matches!(status, Reply::Error(_)));
    drop(running);
    wait_until("room", || collect(&mut exec(agent, &["true"])).2 == Frame::Exit(0));
}
