//! What is where.

use std::cell::Cell;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use serde_json::json;

use super::book::Error;
use super::form::{self, Sent};
use super::http::{HTML, JSON, Request, Response};
use super::{Site, doorbell, page, work};
use crate::facts;

const STYLE: &str = include_str!("../../../images/site/style.css");
const SCRIPT: &str = include_str!("../../../images/site/live.js");
const ICON: &str = include_str!("../../../images/site/icon.svg");

/// Answers at once what neither computes for long nor waits for a disk, so that the event loop may do it.
/// That is also why the counter goes on ticking on the page while all workers are busy.
pub(super) fn answer_at_once(site: &Arc<Site>, request: &Request) -> Option<Response> {
    let asset =
        |kind, text: &'static str| Response::new(200, kind, text.as_bytes()).with("Cache-Control", "max-age=300");
    let known = match request.path.as_str() {
        "/healthz" => Response::text(200, "ok"),
        "/api/status" => json_response(200, &status(site)),
        "/style.css" => asset("text/css; charset=utf-8", STYLE),
        "/live.js" => asset("text/javascript; charset=utf-8", SCRIPT),
        "/icon.svg" | "/favicon.ico" => asset("image/svg+xml", ICON),
        "/" | "/api/guestbook" | "/api/guestbook/check" | "/work" => return None,
        _ => return Some(error(404, "There is no such page here.")),
    };
    Some(only(request, &["GET", "HEAD"]).unwrap_or(known))
}

/// Answers the rest.
pub(super) fn answer(site: &Arc<Site>, request: &Request) -> Response {
    site.answered.fetch_add(1, Ordering::Relaxed);
    match (request.path.as_str(), request.method.as_str()) {
        ("/", "GET") => {
            let visits = site.visits.fetch_add(1, Ordering::Relaxed) + 1;
            Response::new(200, HTML, page::render(site, visits).into_bytes())
        }
        ("/", "HEAD") => Response::new(200, HTML, page::render(site, site.visits.load(Ordering::Relaxed)).into_bytes()),
        ("/api/guestbook", "GET" | "HEAD") => match site.book.latest() {
            Ok(entries) => json_response(200, &json!(entries)),
            Err(why) => json_response(503, &json!({ "error": why.to_string() })),
        },
        ("/api/guestbook", "POST") => write_entry(site, request),
        ("/api/guestbook/check", "GET" | "HEAD") => match site.book.check() {
            Ok(findings) => json_response(200, &json!(findings)),
            Err(why) => json_response(503, &json!({ "error": why.to_string() })),
        },
        ("/work", "GET" | "HEAD") => burn(request),
        ("/api/guestbook", _) => only(request, &["GET", "HEAD", "POST"]).unwrap_or_else(|| Response::text(500, "")),
        _ => only(request, &["GET", "HEAD"]).unwrap_or_else(|| error(404, "There is no such page here.")),
    }
}

/// The refusal of a method that is not among `allowed`.
fn only(request: &Request, allowed: &[&str]) -> Option<Response> {
    let refuse = || Response::text(405, "not here").with("Allow", allowed.join(", "));
    (!allowed.contains(&request.method.as_str())).then(refuse)
}

fn status(site: &Site) -> serde_json::Value {
    json!({
        "hostname": facts::hostname(),
        "cpus": facts::cpus(),
        "memory_bytes": facts::memory_bytes(),
        "uptime_seconds": facts::uptime_seconds(),
        "boot_id": facts::boot_id(),
        "nonce": site.nonce(),
        "ticks": site.ticks.load(Ordering::Relaxed),
        "generation": site.generation.load(Ordering::Relaxed),
        "visits": site.visits.load(Ordering::Relaxed),
        "answered": site.answered.load(Ordering::Relaxed),
        "guestbook_entries": site.book.entries(),
    })
}

fn write_entry(site: &Site, request: &Request) -> Response {
    if request.cross_site {
        return error(403, "Please write from the kitten's own page.");
    }
    let (entry, sent) = match form::entry(request) {
        Ok(read) => read,
        Err(status) => return error(status, "Send a name and a message, as a form or as JSON."),
    };
    let rung = Cell::new(false);
    let ring = || rung.set(doorbell::ring(&format!("guest book, {:?}", entry.ring)));
    let stop = entry.ring.map(|place| (place, &ring as &dyn Fn()));
    let status = match (site.book.write_with_stop(&entry.name, &entry.message, stop), sent) {
        (Ok(_), Sent::Form) => return Response::text(303, "Thank you!").with("Location", "/#guestbook"),
        (Ok(id), Sent::Json) if entry.ring.is_some() => {
            return json_response(201, &json!({ "id": id, "awaited": rung.get() }));
        }
        (Ok(id), Sent::Json) => return json_response(201, &json!({ "id": id })),
        (Err(why), sent) => {
            let status = match why {
                Error::Refused(_) => 400,
                Error::Full => 507,
                Error::Unavailable | Error::Database(_) => 503,
            };
            (status, why.to_string(), sent)
        }
    };
    let (status, why, sent) = status;
    let refused = match sent {
        Sent::Json => json_response(status, &json!({ "error": why })),
        Sent::Form => error(status, &why),
    };
    if status == 503 { refused.with("Retry-After", "1") } else { refused }
}

fn burn(request: &Request) -> Response {
    let n = match form::value(&request.query, "n") {
        None => work::DEFAULT,
        Some(text) => match text.parse() {
            Ok(n) if n <= work::MOST => n,
            _ => return Response::text(400, format!("n is a whole number up to {}", work::MOST)),
        },
    };
    json_response(200, &json!({ "n": n, "primes": work::primes_below(n) }))
}

fn json_response(status: u16, value: &serde_json::Value) -> Response {
    Response::new(status, JSON, value.to_string().into_bytes())
}

fn error(status: u16, why: &str) -> Response {
    Response::new(status, HTML, page::sorry(why).into_bytes())
}
