//! Who may: the docker configuration, helpers, tokens; and TLS.

use std::fs;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::thread;

use base64::Engine;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use catnap::snapshot::Kind;
use serde_json::json;

use super::house::{House, Said, said};
use super::server::Registry;
use super::shots::Shot;

/// `anna`, whose password is `purr`, as htpasswd writes it.
const PASSWORDS: &str = "anna:$2b$05$gPMlXsH/Mdb1l/xHYpXOCuO/XfQiYnFgsJp4N039sMsanZIdmyn9i\n";

fn house() -> House {
    let house = House::new();
    Shot::new(&house.store(), Kind::Crash, "anna@x", 0).with_kernel(1000).filled(1, 7).take();
    house
}

/// Runs the program with a docker configuration, and with `folder` first on its PATH.
fn with(house: &House, folder: &Path, configuration: &serde_json::Value, line: &str) -> Said {
    fs::write(folder.join("config.json"), configuration.to_string()).unwrap();
    let path = format!("{}:{}", folder.display(), std::env::var("PATH").unwrap());
    let mut command = house.program();
    said(command.env("DOCKER_CONFIG", folder).env("PATH", path).args(line.split(' ')).output().unwrap())
}

fn basic(name: &str, password: &str) -> String {
    STANDARD.encode(format!("{name}:{password}"))
}

#[test]
fn names_and_passwords_come_from_where_docker_keeps_them() {
    let files = tempfile::tempdir().unwrap();
    let passwords = files.path().join("passwords");
    fs::write(&passwords, PASSWORDS).unwrap();
    let registry = Registry::with(&format!("auth: {{htpasswd: {{realm: cats, path: {}}}}}", passwords.display()));
    let (house, host) = (house(), format!("localhost:{}", registry.port));
    let push = format!("snapshot push anna@x {}", registry.at("x"));
    let run = |configuration: serde_json::Value| with(&house, files.path(), &configuration, &push);

    for wrong in [json!({}), json!({"auths": {&host: {"auth": basic("anna", "hiss")}}})] {
        let said = run(wrong);
        assert!(said.code == Some(4) && said.err.contains("does not let you push"), "{said:?}");
        assert!(said.err.contains("\ntry: docker login") && !said.err.contains("hiss"), "{said:?}");
    }
    let said = run(json!({"auths": {&host: {"auth": "?"}}}));
    assert!(said.code == Some(1) && said.err.contains("config.json cannot be used"), "{said:?}");
    assert_eq!(registry.blobs(), 0);
    assert_eq!(run(json!({"auths": {&host: {"auth": basic("anna", "purr")}}})).code, Some(0));

    let helper = files.path().join("docker-credential-cats");
    let script = |body: &str| {
        fs::write(&helper, format!("#!/bin/sh\n{body}\n")).unwrap();
        fs::set_permissions(&helper, fs::Permissions::from_mode(0o755)).unwrap();
    };
    let answer =
        format!(r#"[ "$1" = get ] && [ "$(cat)" = {host} ] && echo '{{"Username": "anna", "Secret": "purr"}}'"#);
    for configuration in [json!({"credHelpers": {&host: "cats"}}), json!({"credsStore": "cats"})] {
        script(&answer);
        let said = run(configuration.clone());
        assert_eq!(said.code, Some(0), "{said:?}");
        script("echo credentials not found in native keychain; exit 1");
        assert_eq!(run(configuration.clone()).code, Some(4));
        script("echo the keychain is locked; exit 1");
        let said = run(configuration.clone());
        assert!(
            said.code == Some(1) && said.err.contains("docker-credential-cats gave nothing: the keychain"),
            "{said:?}"
        );
        script("echo meow");
        assert!(run(configuration).err.contains("it answers something else"));
    }
}

fn openssl(folder: &Path, line: &str) {
    let output = Command::new("openssl").current_dir(folder).args(line.split(' ')).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

/// A key, and a certificate for this machine that nobody trusts by himself.
fn certificate(folder: &Path) {
    openssl(
        folder,
        "req -x509 -newkey rsa:2048 -nodes -keyout key.pem -out cert.pem -days 2 -subj /CN=localhost \
         -addext subjectAltName=DNS:localhost,IP:127.0.0.1 -addext basicConstraints=critical,CA:FALSE",
    );
}

#[test]
fn tls_is_spoken_where_it_is_and_only_to_whom_the_host_trusts() {
    let files = tempfile::tempdir().unwrap();
    certificate(files.path());
    let folder = files.path().display();
    let registry = Registry::with(&format!(
        "http: {{addr: \"127.0.0.1:PORT\", tls: {{certificate: {folder}/cert.pem, key: {folder}/key.pem}}}}"
    ));
    let house = house();
    let run = |roots: &str, options: &str| {
        let line = format!("snapshot push anna@x {}{options}", registry.at("x"));
        let mut command = house.program();
        said(command.env("SSL_CERT_FILE", files.path().join(roots)).args(line.split(' ')).output().unwrap())
    };
    // The host's own certificates are others.
    openssl(files.path(), "req -x509 -newkey rsa:2048 -nodes -keyout other.key -out other.pem -days 2 -subj /CN=other");
    let said = run("other.pem", "");
    assert!(said.code == Some(6) && said.err.contains("its TLS is not to be trusted"), "{said:?}");
    let said = run("cert.pem", "");
    assert_eq!((said.code, said.out), (Some(0), format!("{}\n", registry.at("x"))), "{}", said.err);
    // In the clear it answers that it does not speak so.
    assert_eq!(run("cert.pem", " --plain-http").code, Some(1));
}

/// A token server, whose tokens the registry believes: signed by its key (RFC 7519; docker's "Token Authentication
/// Implementation"). It notes what it was asked.
struct Tokens {
    port: u16,
    asked: Arc<Mutex<Vec<String>>>,
}

impl Tokens {
    fn serve(folder: &Path) -> Tokens {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let (port, asked) = (listener.local_addr().unwrap().port(), Arc::new(Mutex::new(Vec::new())));
        let (folder, noted) = (folder.to_owned(), asked.clone());
        thread::spawn(move || listener.incoming().for_each(|stream| answer(stream.unwrap(), &folder, &noted)));
        Tokens { port, asked }
    }
}

fn answer(mut stream: TcpStream, folder: &Path, asked: &Mutex<Vec<String>>) {
    let mut request = vec![0; 16384];
    let mut length = 0;
    // All of a request of this client fits.
    while !whole(&request[..length]) {
        match stream.read(&mut request[length..]) {
            Ok(count @ 1..) => length += count,
            _ => return,
        }
    }
    let request = String::from_utf8_lossy(&request[..length]).into_owned();
    let may = request.contains(&basic("anna", "purr")) || request.contains("refresh_token=forever");
    let actions: &[&str] = match request.contains("pull%2Cpush") || request.contains("pull,push") {
        true => &["pull", "push"],
        false => &["pull"],
    };
    asked.lock().unwrap().push(request);
    let answer = match may {
        true => {
            let body = json!({ "token": token(folder, actions) }).to_string();
            format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}", body.len())
        }
        false => "HTTP/1.1 401 No\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".into(),
    };
    stream.write_all(answer.as_bytes()).unwrap();
}

/// Whether a request has its whole body.
fn whole(request: &[u8]) -> bool {
    let text = String::from_utf8_lossy(request).to_ascii_lowercase();
    let Some((head, body)) = text.split_once("\r\n\r\n") else { return false };
    let length = head.lines().find_map(|line| line.strip_prefix("content-length: ")?.trim().parse::<usize>().ok());
    length.map_or(!head.contains("chunked") || body.ends_with("0\r\n\r\n"), |length| body.len() >= length)
}

fn token(folder: &Path, actions: &[&str]) -> String {
    let pem = fs::read_to_string(folder.join("cert.pem")).unwrap();
    let der: String = pem.lines().filter(|line| !line.starts_with('-')).collect();
    let now = std::time::UNIX_EPOCH.elapsed().unwrap().as_secs();
    let head = json!({ "typ": "JWT", "alg": "RS256", "x5c": [der] });
    let claims = json!({
        "iss": "cats", "sub": "anna", "aud": "the registry", "jti": "1",
        "nbf": now - 60, "iat": now, "exp": now + 300,
        "access": [{ "type": "repository", "name": "cats/anna", "actions": actions }],
    });
    let part = |bytes: &[u8]| URL_SAFE_NO_PAD.encode(bytes);
    let signed = format!("{}.{}", part(head.to_string().as_bytes()), part(claims.to_string().as_bytes()));
    let (file, signature) = (folder.join("signed"), folder.join("signature"));
    fs::write(&file, &signed).unwrap();
    openssl(folder, "dgst -sha256 -sign key.pem -out signature signed");
    format!("{signed}.{}", part(&fs::read(signature).unwrap()))
}

#[test]
fn tokens_are_fetched_from_where_the_registry_says() {
    let files = tempfile::tempdir().unwrap();
    certificate(files.path());
    let tokens = Tokens::serve(files.path());
    let registry = Registry::with(&format!(
        "auth: {{token: {{realm: \"http://localhost:{}/token\", service: the registry, issuer: cats, \
         rootcertbundle: {}/cert.pem}}}}",
        tokens.port,
        files.path().display()
    ));
    let (house, host) = (house(), format!("localhost:{}", registry.port));
    let run =
        |entry: serde_json::Value, line: String| with(&house, files.path(), &json!({"auths": {&host: entry}}), &line);
    let push = || format!("snapshot push anna@x {}", registry.at("x"));

    let said = run(json!({"auth": basic("anna", "hiss")}), push());
    assert!(said.code == Some(4) && said.err.contains("does not let you push"), "{said:?}");
    tokens.asked.lock().unwrap().clear();
    let said = run(json!({"auth": basic("anna", "purr")}), push());
    assert_eq!((said.code, said.out), (Some(0), format!("{}\n", registry.at("x"))), "{}", said.err);
    let asked = tokens.asked.lock().unwrap().clone();
    // One token for all chunks, and all threads.
    assert_eq!(asked.len(), 1, "{asked:?}");
    for words in ["GET /token?", "service=the%20registry", "scope=repository%3Acats%2Fanna%3Apull%2Cpush"] {
        assert!(asked[0].contains(words), "{words}: {}", asked[0]);
    }
    // An identity token gets others.
    let there = House::new();
    let pull = format!("snapshot pull {}", registry.at("x"));
    let said = with(&there, files.path(), &json!({"auths": {&host: {"identitytoken": "forever"}}}), &pull);
    assert_eq!((said.code, said.out.as_str()), (Some(0), "anna@x\n"), "{}", said.err);
    let asked = tokens.asked.lock().unwrap().last().unwrap().clone();
    assert!(asked.starts_with("POST /token") && asked.contains("grant_type=refresh_token"), "{asked}");
    assert!(!asked.contains("push"), "{asked}");
}
