//! A machine's own page, passed on into a frame of the dashboard.
//!
//! What a guest serves is not trusted: the frame has no origin (`sandbox`), cannot load from elsewhere, and its address
//! has a key of its own, which opens nothing but this machine's page. Because the page has no origin, its requests look like
//! a stranger's, so only the key tells who may ask.

use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::http::header::{self, HeaderValue};
use axum::http::{Method, Response, StatusCode};

use super::kitten::{self, Answer, Ask};

/// How long a page may take.
const PATIENCE: Duration = Duration::from_secs(10);
/// The longest path with its query, in bytes.
const LONGEST_PATH: usize = 1024;

/// What such a page may do: run its scripts and send its forms, and speak to nobody but itself.
const POLICY: &str = "sandbox allow-scripts allow-forms; default-src 'self' 'unsafe-inline' data:; \
                      form-action 'self'; base-uri 'none'; frame-ancestors 'self'";

/// Asks the page behind `port` for `path` (after the slash) and gives its answer. `root` is what the machine's page
/// is here.
pub async fn pass(port: u16, root: &str, request: Request<'_>) -> Response<Body> {
    let Request { method, path, query, content_type, body } = request;
    let path = format!("/{path}{}", query.map_or(String::new(), |query| format!("?{query}")));
    let writes = method == Method::POST && path == "/api/guestbook";
    if !(writes || method == Method::GET || method == Method::HEAD) {
        return page(StatusCode::METHOD_NOT_ALLOWED, "This is not passed on.");
    }
    if path.len() > LONGEST_PATH || !path.bytes().all(|byte| byte.is_ascii_graphic()) {
        return page(StatusCode::BAD_REQUEST, "There is no such page.");
    }
    let content_type = content_type.filter(|kind| kind.bytes().all(|byte| (b' '..=b'~').contains(&byte)));
    match kitten::answer(port, &Ask { method: method.as_str(), path: &path, content_type, body }, PATIENCE).await {
        Ok(answer) => dress(answer, root),
        Err(why) => page(StatusCode::BAD_GATEWAY, &format!("The kitten naps, or is away: {why}.")),
    }
}

/// What is asked of a machine's page.
pub struct Request<'a> {
    /// How.
    pub method: &'a Method,
    /// What, without the first slash.
    pub path: &'a str,
    /// Behind the question mark.
    pub query: Option<&'a str>,
    /// What the body is.
    pub content_type: Option<&'a str>,
    /// The body, of bounded length.
    pub body: &'a Bytes,
}

/// The guest's answer with our own headers, and none of its.
fn dress(answer: Answer, root: &str) -> Response<Body> {
    let mut response = Response::new(Body::from(answer.body));
    *response.status_mut() = StatusCode::from_u16(answer.status).unwrap_or(StatusCode::BAD_GATEWAY);
    let headers = response.headers_mut();
    let kind = answer.content_type.unwrap_or_else(|| "application/octet-stream".into());
    if let Ok(kind) = HeaderValue::from_str(&kind) {
        headers.insert(header::CONTENT_TYPE, kind);
    }
    // Its own pages only.
    let location = answer.location.filter(|to| to.starts_with('/') && !to.starts_with("//"));
    if let Some(Ok(to)) = location.map(|to| HeaderValue::from_str(&format!("{root}{}", &to[1..]))) {
        headers.insert(header::LOCATION, to);
    }
    guard(&mut response);
    response
}

/// A word in place of the page, which tries again by itself.
pub fn page(status: StatusCode, text: &str) -> Response<Body> {
    let text: String = text.chars().filter(|c| !c.is_control() && !"<>&".contains(*c)).collect();
    let html = format!(
        "<!doctype html><meta charset=utf-8><meta http-equiv=refresh content=2><meta name=color-scheme content='light dark'>\
         <body style='font:1.2rem/1.5 system-ui;display:grid;place-items:center;min-height:90vh;text-align:center'>\
         <p>{text}</p>"
    );
    let mut response = Response::new(Body::from(html));
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("text/html; charset=utf-8"));
    guard(&mut response);
    response
}

fn guard(response: &mut Response<Body>) {
    for (name, value) in [
        (header::CONTENT_SECURITY_POLICY, POLICY),
        // The page has no origin, so that all that it asks of itself comes from elsewhere.
        (header::ACCESS_CONTROL_ALLOW_ORIGIN, "*"),
        (header::REFERRER_POLICY, "no-referrer"),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::CACHE_CONTROL, "no-store"),
    ] {
        response.headers_mut().insert(name, HeaderValue::from_static(value));
    }
}
