//! What somebody who means harm can put into a registry.

use std::io::{Read, Write};
use std::net::TcpListener;
use std::sync::Arc;

use catnap::oci::{Access, Client, Presence};
use catnap::snapshot::{Digest, Kind};
use serde_json::{Value, json};

use super::house::House;
use super::server::{Registry, nothing_has_come, push};
use super::shots::Shot;

const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";

/// An honest artifact, taken apart.
struct Forged {
    artifact: Value,
    /// The list of chunks.
    list: Value,
    /// `snapshot.json`.
    snapshot: Value,
    /// What is put there in place of the list, or of the first chunk, when that is not to be what it should.
    frame: Option<Vec<u8>>,
    chunk: Option<Vec<u8>>,
}

struct Forge {
    registry: Registry,
    pushed: Value,
    there: House,
}

/// Changes an honest artifact.
type Change = fn(&mut Forged);

impl Forge {
    fn new() -> Forge {
        let (registry, here) = (Registry::start(), House::new());
        let kitten = Shot::new(&here.store(), Kind::Clean, "kitten", 0).noisy(2).take();
        let store = here.store();
        let anna = Shot::new(&store, Kind::Live, "anna@x", 60).bootable().over(&kitten);
        anna.memory(&[(0, 1), (6, 2)], None).take();
        let pushed = push(&here, "anna@x", &registry.at("honest"));
        Forge { registry, pushed, there: House::new() }
    }

    fn client(&self, tag: &str) -> Arc<Client> {
        Arc::new(Client::new(&self.registry.at(tag).parse().unwrap(), Access::Push, true).unwrap())
    }

    fn blob(&self, descriptor: &Value) -> Vec<u8> {
        std::fs::read(self.registry.blob(descriptor["digest"].as_str().unwrap())).unwrap()
    }

    /// Changes the artifact, puts it there, and has it pulled.
    fn pull(&self, change: Change) -> super::house::Said {
        let client = self.client("forged");
        let artifact = self.registry.artifact(&self.pushed);
        let list = zstd::decode_all(&self.blob(&artifact["layers"][0])[..]).unwrap();
        let mut forged = Forged {
            list: serde_json::from_slice(&list).unwrap(),
            snapshot: serde_json::from_slice(&self.blob(&artifact["config"])).unwrap(),
            artifact,
            frame: None,
            chunk: None,
        };
        let before = forged.artifact.clone();
        change(&mut forged);
        let list = forged.frame.unwrap_or_else(|| zstd::bulk::compress(&bytes(&forged.list), 3).unwrap());
        let mut put = |place: &[&str], blob: &[u8]| {
            let at = place.iter().fold(String::new(), |path, part| format!("{path}/{part}"));
            client.put_blob(&Digest::of(blob), blob).unwrap();
            // What a case has changed of it stays as that has it.
            let same = forged.artifact.pointer(&at) == before.pointer(&at);
            if let Some(descriptor) = forged.artifact.pointer_mut(&at).filter(|_| same) {
                descriptor["digest"] = Digest::of(blob).to_string().into();
                descriptor["size"] = blob.len().into();
            }
        };
        put(&["layers", "0"], &list);
        put(&["config"], &bytes(&forged.snapshot));
        if let Some(chunk) = &forged.chunk {
            put(&["layers", "1"], chunk);
        }
        client.put_manifest(&bytes(&forged.artifact), MANIFEST).unwrap();
        self.there.catnap(&format!("snapshot pull {}", self.registry.at("forged")))
    }
}

fn bytes(value: &Value) -> Vec<u8> {
    serde_json::to_vec(value).unwrap()
}

#[test]
fn hostile_artifacts_are_refused_and_leave_nothing() {
    let forge = Forge::new();
    let cases: &[(&str, Change)] = &[
        ("its type is application/x", |f| f.artifact["artifactType"] = "application/x".into()),
        ("its type is application/vnd.oci.image.config", |f| {
            f.artifact.as_object_mut().unwrap().remove("artifactType");
            f.artifact["config"]["mediaType"] = "application/vnd.oci.image.config.v1+json".into();
        }),
        ("has no list of chunks", |f| f.artifact["layers"] = json!([])),
        ("its layers are not", |f| f.artifact["layers"][0]["mediaType"] = "application/x".into()),
        ("its layers are not", |f| f.artifact["layers"][1]["size"] = (1u64 << 40).into()),
        ("its layers are not", |f| f.artifact["layers"][1]["size"] = 0.into()),
        ("it is no OCI manifest", |f| f.artifact["layers"][1]["size"] = json!(-1)),
        ("its snapshot.json has", |f| f.artifact["config"]["size"] = (1u64 << 40).into()),
        ("more than the 1 bytes", |f| f.artifact["config"]["size"] = 1.into()),
        ("more than the 9 bytes", |f| f.artifact["layers"][1]["size"] = 9.into()),
        ("has the digest", |f| f.artifact["layers"][1]["size"] = 100_000.into()),
        ("another chunk than its list says", |f| {
            let other = f.artifact["layers"][2].clone();
            f.artifact["layers"][1] = other;
        }),
        ("chunks, and lists", |f| drop(f.artifact["layers"].as_array_mut().unwrap().pop())),
        ("chunks, and lists", |f| {
            let layer = f.artifact["layers"][1].clone();
            f.artifact["layers"].as_array_mut().unwrap().extend(vec![layer; 20_000]);
        }),
        // Bombs: a frame of nothing but zeros, one that promises them, and one that does not say.
        ("a frame does not say its length, or a wrong one", |f| {
            f.frame = Some(zstd::bulk::compress(&vec![0; 64 << 20], 3).unwrap())
        }),
        ("a frame does not say its length, or a wrong one", |f| {
            f.frame = Some(zstd::encode_all(&[0; 100][..], 3).unwrap())
        }),
        ("a frame does not say its length, or a wrong one", |f| {
            f.chunk = Some(zstd::bulk::compress(&vec![0; 64 << 20], 3).unwrap())
        }),
        ("a frame is damaged", |f| f.chunk = Some([zstd::bulk::compress(b"x", 3).unwrap(), b"more".to_vec()].concat())),
        ("a frame does not say", |f| f.frame = Some(b"no frame".to_vec())),
        ("another chunk than its list says", |f| f.chunk = Some(zstd::bulk::compress(b"something else", 3).unwrap())),
        ("its list of chunks is none", |f| f.list = json!([1])),
        ("of format 2", |f| f.list["format"] = 2.into()),
        ("is of other files", |f| f.list["files"][0]["name"] = "../../kernel".into()),
        ("would cover", |f| f.list["files"][0]["span"] = 1.into()),
        ("do not make up its size", |f| f.list["files"][0]["pieces"] = json!([999_999])),
        ("do not make up its size", |f| f.list["files"][0]["pieces"] = json!([-1])),
        ("do not make up its size", |f| f.list["files"][0]["pieces"] = json!([i64::MIN, i64::MIN, 0])),
        ("is not sound", |f| f.snapshot["files"][0]["name"] = "../kernel".into()),
        ("is not sound", |f| f.snapshot["files"][0]["name"] = "/etc/passwd".into()),
        ("it needs another snapshot", |f| f.snapshot["memory"]["parent"] = Digest::of(b"").to_string().into()),
        ("is not a snapshot's manifest", |f| f.snapshot = json!("x")),
        ("has not one kernel", |f| f.snapshot["files"][0]["role"] = "initrd".into()),
        ("is damaged: its digest is", |f| f.snapshot["files"][0]["digest"] = Digest::of(b"").to_string().into()),
        ("larger than anything", |f| {
            for file in f.snapshot["files"].as_array_mut().unwrap() {
                file["size"] = u64::MAX.into();
            }
        }),
    ];
    for (why, change) in cases {
        let said = forge.pull(*change);
        assert!(said.code == Some(6) && said.err.contains(why) && said.out.is_empty(), "{said:?} ({why})");
        assert!(said.err.contains("\ntry: "), "{said:?}");
        nothing_has_come(&forge.there);
    }
    // Names that lead elsewhere are not taken over, and one of the user's own will do.
    let said = forge.pull(|f| f.snapshot["name"] = "../../.bashrc".into());
    assert!(said.code == Some(6) && said.err.contains("snapshot pull --name"), "{said:?}");
    // More than there is room for is not begun.
    let said = forge.pull(|f| {
        f.snapshot["files"][0]["size"] = (1u64 << 60).into();
        f.list["files"][0]["pieces"] = json!([0, 8 - (1i64 << 60)]);
    });
    assert!(said.code == Some(1) && said.err.contains("bytes are needed"), "{said:?}");
    nothing_has_come(&forge.there);
    // A later catnap's, and an honest one that says more.
    let said = forge.pull(|f| f.snapshot["format"] = 2.into());
    assert!(said.code == Some(4) && said.err.contains("later catnap"), "{said:?}");
    let said = forge.pull(|f| f.artifact["annotations"] = json!({"x": "y"}));
    assert_eq!((said.code, said.out.as_str()), (Some(0), "anna@x\n"), "{said:?}");
}

/// A server that gives this answer to whoever sends that request.
fn answers(answer: impl Fn(&str) -> String + Clone + Send + 'static) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let (mut stream, answer) = (stream.unwrap(), answer.clone());
            std::thread::spawn(move || {
                let mut request = [0; 4096];
                while let Ok(count @ 1..) = stream.read(&mut request) {
                    let answer = answer(&String::from_utf8_lossy(&request[..count]));
                    if stream.write_all(answer.as_bytes()).is_err()
                        || answer.starts_with("SSH")
                        || answer.contains(": 9\r")
                    {
                        break;
                    }
                }
            });
        }
    });
    port
}

/// What a registry answers when it is no registry.
#[test]
fn other_servers_are_not_taken_for_registries() {
    let endless = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{}", 64 << 20, " ".repeat(5 << 20));
    let away = |to: &str| format!("HTTP/1.1 307 Moved\r\nLocation: {to}\r\nContent-Length: 0\r\n\r\n");
    let challenge = |what: &str| format!("HTTP/1.1 401 No\r\nWWW-Authenticate: {what}\r\nContent-Length: 0\r\n\r\n");
    for (answer, code, words) in [
        ("SSH-2.0-cats\r\n".to_owned(), 1, "cannot be reached"),
        ("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}".to_owned(), 6, "it is no OCI manifest"),
        ("HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{}".to_owned(), 1, "cannot be reached"),
        (endless, 6, "more than the 4194304 bytes"),
        (away("http://10.0.0.1/v2/x"), 4, "10.0.0.1 can only be spoken to without encryption"),
        (away("file:///etc/passwd"), 6, "an address that is none"),
        (away("http://user:secret@localhost/x"), 6, "an address that is none"),
        (away("/v2/around/and/around"), 6, "from one place to another"),
        (challenge("Basic realm=\"x\""), 4, "does not let you pull from there"),
        (challenge("Negotiate"), 4, "does not let you pull from there"),
        (challenge("Bearer realm=\"http://10.0.0.1/token\""), 4, "10.0.0.1 can only be spoken to"),
        (challenge("Bearer realm=\"x\""), 6, "an address that is none"),
        ("HTTP/1.1 500 Oh\r\nContent-Length: 0\r\n\r\n".to_owned(), 1, "it answers 500"),
    ] {
        let shown = answer.chars().take(100).collect::<String>();
        let port = answers(move |_| answer.clone());
        let said = House::new().catnap(&format!("snapshot pull localhost:{port}/x:y"));
        assert!(said.code == Some(code) && said.err.contains(words), "{shown}: {said:?}");
        assert!(!said.err.contains("secret"), "{said:?}");
    }
}

/// What is sent to a server that sends everybody elsewhere is stored nowhere.
#[test]
fn a_push_that_is_sent_elsewhere_has_not_arrived() {
    const FREE: &str = "HTTP/1.1 404 No\r\nContent-Length: 0\r\n\r\n";
    const THERE: &str = "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n";
    const AWAY: &str = "HTTP/1.1 301 Moved\r\nLocation: /front?door=hidden\r\nContent-Length: 0\r\n\r\n";
    let here = House::new();
    Shot::new(&here.store(), Kind::Crash, "anna@x", 0).with_kernel(1000).filled(1, 7).take();
    let push = |port: u16| here.catnap(&format!("snapshot push anna@x localhost:{port}/x:y --yes"));
    let everything = answers(|_| AWAY.into());
    let blobs = answers(|request| if request.starts_with("HEAD") { FREE.into() } else { AWAY.into() });
    // It has all blobs, and only the manifest is left to be put there.
    let manifests = answers(|request| if request.starts_with("HEAD") { THERE.into() } else { AWAY.into() });
    for (port, words) in [
        (everything, "from one place to another".to_owned()),
        (blobs, format!("asked to take a blob, it answers 301 and sends us to localhost:{blobs}")),
        (manifests, format!("asked to take the manifest, it answers 301 and sends us to localhost:{manifests}")),
    ] {
        let said = push(port);
        assert!(said.code == Some(6) && said.err.contains(&words) && said.out.is_empty(), "{said:?}");
        assert!(!said.err.contains("hidden"), "{said:?}");
    }
    // Where a registry keeps its blobs elsewhere, that place tells.
    for (elsewhere, there) in [(THERE, Presence::Whole), (FREE, Presence::Missing)] {
        let port = answers(move |request| if request.contains("/front") { elsewhere.into() } else { AWAY.into() });
        let reference = format!("localhost:{port}/x:y").parse().unwrap();
        let client = Client::new(&reference, Access::Push, true).unwrap();
        assert_eq!(client.has_blob(&Digest::of(b"x"), 1).unwrap(), there);
    }
}
