//! What is where, and who is let in.

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::Router;
use axum::body::{Body, Bytes, to_bytes};
use axum::extract::State;
use axum::http::header::{self, HeaderValue};
use axum::http::{Method, Request, Response, StatusCode};
use axum::serve::Listener;
use futures_util::stream;
use serde::{Deserialize, Serialize};
use serde_json::json;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, Sleep, sleep};

use super::gate::{self, Refusal};
use super::watch::{Hub, run_blocking, run_bounded};
use super::{House, Settings, proxy};
use crate::control::{Code, Failure};
use crate::spec::Name;

const PAGE: &str = include_str!("page/index.html");
const STYLE: &str = include_str!("page/style.css");
const SCRIPT: &str = include_str!("page/app.js");
const CHARTS: &str = include_str!("page/charts.js");
const ICON: &str = include_str!("../../images/site/icon.svg");

/// Connections at one time, and how many of them may be streams of events.
const CONNECTIONS: usize = 128;
const STREAMS: usize = 32;
/// The longest body, in bytes.
const BODY: usize = 64 << 10;
/// How long one may take to come.
const ARRIVAL: Duration = Duration::from_secs(10);
/// How long a connection may go on without being sent anything. Streams of events are sent something twice a second, and
/// no answer takes half as long; so this ends those that never finish a request, and those that nobody uses.
const SILENCE: Duration = Duration::from_secs(60);
/// How long a monitor may take to map its memory.
const MAPPING: Duration = Duration::from_secs(10);

/// What the page may do: be itself, and show frames of machines.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; \
                      frame-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

struct Site {
    hub: Arc<Hub>,
    token: String,
    /// What the keys of machines' pages are made of.
    secret: String,
    streams: Arc<Semaphore>,
    /// Maps are made one after the other.
    mapping: Semaphore,
}

/// Answers until the process is asked to end.
pub async fn run(listener: TcpListener, token: String, settings: &Settings, house: Arc<dyn House>) -> io::Result<()> {
    let hub = Hub::new(house, settings.rows.clone());
    let site = Arc::new(Site {
        hub: hub.clone(),
        token,
        secret: gate::secret()?,
        streams: Arc::new(Semaphore::new(STREAMS)),
        mapping: Semaphore::new(1),
    });
    let watching = tokio::spawn(hub.clone().watch());
    let router = Router::new().fallback(enter).with_state(site);
    let places = Arc::new(Semaphore::new(CONNECTIONS));
    tokio::select! {
        result = axum::serve(Bounded { listener, places }, router) => result?,
        result = asked_to_end() => result?,
    }
    watching.abort();
    hub.jobs.end().await;
    Ok(())
}

async fn asked_to_end() -> io::Result<()> {
    let mut signals = [SignalKind::interrupt(), SignalKind::terminate(), SignalKind::hangup()].map(signal);
    let [Ok(interrupt), Ok(terminate), Ok(hangup)] = &mut signals else {
        return signals.into_iter().find_map(Result::err).map_or(Ok(()), Err);
    };
    tokio::select! { _ = interrupt.recv() => {}, _ = terminate.recv() => {}, _ = hangup.recv() => {} }
    Ok(())
}

/// Every request comes in here, and no other way.
async fn enter(State(site): State<Arc<Site>>, request: Request<Body>) -> Response<Body> {
    match site.admit(&request) {
        Err(refusal) => dress(text(refusal.status(), refusal.text())),
        Ok(Door::Page { name, path }) => site.machine_page(&name, &path, request).await,
        Ok(Door::House(path)) => dress(match site.answer(&path, request).await {
            Ok(response) => response,
            Err(failure) => fail(&failure),
        }),
    }
}

/// What a request has opened.
enum Door {
    /// The dashboard's own, with the path behind the token.
    House(String),
    /// A machine's page.
    Page { name: String, path: String },
}

impl Site {
    fn admit(&self, request: &Request<Body>) -> Result<Door, Refusal> {
        let headers = request.headers();
        let host = gate::check_host(headers)?;
        let path = request.uri().path().strip_prefix('/').unwrap_or_default();
        if let Some(rest) = path.strip_prefix("page/") {
            let mut parts = rest.splitn(3, '/');
            return match (parts.next(), parts.next(), parts.next()) {
                (Some(key), Some(name), Some(path)) if gate::same(key, &gate::key_of(&self.secret, name)) => {
                    Ok(Door::Page { name: name.into(), path: path.into() })
                }
                _ => Err(Refusal::Token),
            };
        }
        gate::check_origin(headers, host)?;
        match path.split_once('/') {
            Some((token, rest)) if gate::same(token, &self.token) => Ok(Door::House(rest.into())),
            _ => Err(Refusal::Token),
        }
    }

    async fn answer(&self, path: &str, request: Request<Body>) -> Result<Response<Body>, Failure> {
        let parts: Vec<&str> = path.split('/').collect();
        match (request.method(), &parts[..]) {
            (&Method::GET, [""]) => Ok(asset("text/html; charset=utf-8", PAGE)),
            (&Method::GET, ["style.css"]) => Ok(asset("text/css; charset=utf-8", STYLE)),
            (&Method::GET, ["app.js"]) => Ok(asset("text/javascript; charset=utf-8", SCRIPT)),
            (&Method::GET, ["charts.js"]) => Ok(asset("text/javascript; charset=utf-8", CHARTS)),
            (&Method::GET, ["icon.svg"]) => Ok(asset("image/svg+xml", ICON)),
            (&Method::GET, ["api", "events"]) => self.events(),
            (&Method::GET, ["api", "tree"]) => json_response(StatusCode::OK, &*self.hub.tree().await),
            // Where a machine's page is; it is not told the token, nor where others are.
            (&Method::GET, ["api", "page", name]) => {
                json_response(StatusCode::OK, &json!({ "root": self.root(&machine(name)?) }))
            }
            (&Method::GET, ["api", "snapshot", reference]) => {
                let (house, reference) = (self.hub.house().clone(), (*reference).to_owned());
                json_response(StatusCode::OK, &run_blocking(move || house.snapshot(&reference)).await?)
            }
            (&Method::GET, ["api", "memory", name]) => self.memory(name).await,
            (&Method::POST, ["api", "run"]) => {
                let Run { words } = body(request).await?;
                let refuse = |why| Failure::new(Code::Usage, why);
                let id = self.hub.jobs.begin(words).map_err(refuse)?;
                json_response(StatusCode::ACCEPTED, &json!({ "id": id }))
            }
            (&Method::POST, ["api", "interrupt"]) => {
                let Interrupt { id } = body(request).await?;
                json_response(StatusCode::OK, &json!({ "interrupted": self.hub.jobs.interrupt(id) }))
            }
            (method, _) => Err(Failure::new(Code::NotFound, format!("there is no {method} /{path} here"))),
        }
    }

    /// Always the latest text: a reader that is slow gets fewer of them, and costs no more than one.
    fn events(&self) -> Result<Response<Body>, Failure> {
        let permit = self.streams.clone().try_acquire_owned().map_err(|_| {
            Failure::new(Code::Refused, format!("{STREAMS} pages look already")).hint("close one of them")
        })?;
        let texts = stream::unfold((self.hub.subscribe(), permit), |(mut texts, permit)| async move {
            texts.changed().await.ok()?;
            let text = texts.borrow_and_update().clone();
            Some((Ok::<_, Infallible>(text), (texts, permit)))
        });
        Ok(asset_of("text/event-stream", Body::from_stream(texts)))
    }

    async fn memory(&self, name: &str) -> Result<Response<Body>, Failure> {
        let (house, name) = (self.hub.house().clone(), machine(name)?);
        let late = || Failure::new(Code::Refused, "the monitor does not answer in time");
        let Ok(_alone) = self.mapping.acquire().await else { return Err(late()) };
        let map = run_bounded(MAPPING, move || Ok::<_, Failure>(house.client(&name)?.memory_map(CELLS)?)).await;
        json_response(StatusCode::OK, &map.ok_or_else(late)??)
    }

    fn root(&self, machine: &Name) -> String {
        format!("/page/{}/{machine}/", gate::key_of(&self.secret, machine.as_str()))
    }

    async fn machine_page(&self, name: &str, path: &str, request: Request<Body>) -> Response<Body> {
        let found = match machine(name) {
            Ok(name) => self.hub.port(&name).await.map(|port| (port, self.root(&name))),
            Err(failure) => Err(failure),
        };
        let (port, root) = match found {
            Ok(found) => found,
            Err(failure) => return proxy::page(StatusCode::NOT_FOUND, &format!("{}.", failure.error)),
        };
        let (head, body) = request.into_parts();
        let Some(body) = arrived(body).await else {
            return proxy::page(StatusCode::PAYLOAD_TOO_LARGE, "That is too long.");
        };
        let content_type = head.headers.get(header::CONTENT_TYPE).and_then(|kind| kind.to_str().ok());
        let asked = proxy::Request { method: &head.method, path, query: head.uri.query(), content_type, body: &body };
        proxy::pass(port, &root, asked).await
    }
}

/// The cells of a map: enough for a picture, and few enough for a screen.
const CELLS: u32 = 1024;

/// The body of `POST api/run`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Run {
    words: Vec<String>,
}

/// The body of `POST api/interrupt`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Interrupt {
    id: u64,
}

fn machine(name: &str) -> Result<Name, Failure> {
    name.parse().map_err(|_| Failure::new(Code::NotFound, "there is no machine of that name"))
}

async fn body<T: for<'a> Deserialize<'a>>(request: Request<Body>) -> Result<T, Failure> {
    let nonsense = |why: String| Failure::new(Code::Usage, why);
    let kind = request.headers().get(header::CONTENT_TYPE).and_then(|kind| kind.to_str().ok());
    // A form of another page cannot send this.
    if kind.is_none_or(|kind| !kind.eq_ignore_ascii_case("application/json")) {
        return Err(nonsense("send application/json".into()));
    }
    let bytes =
        arrived(request.into_body()).await.ok_or_else(|| nonsense("the body does not come, or is too long".into()))?;
    serde_json::from_slice(&bytes).map_err(|error| nonsense(format!("the body makes no sense: {error}")))
}

async fn arrived(body: Body) -> Option<Bytes> {
    tokio::time::timeout(ARRIVAL, to_bytes(body, BODY)).await.ok()?.ok()
}

fn fail(failure: &Failure) -> Response<Body> {
    let status = match failure.code {
        Code::Usage => StatusCode::BAD_REQUEST,
        Code::NotFound => StatusCode::NOT_FOUND,
        Code::Refused => StatusCode::CONFLICT,
        Code::Host => StatusCode::SERVICE_UNAVAILABLE,
        Code::Failed | Code::Verify => StatusCode::INTERNAL_SERVER_ERROR,
    };
    json_response(status, failure).unwrap_or_else(|_| text(status, "failed"))
}

fn json_response(status: StatusCode, value: &impl Serialize) -> Result<Response<Body>, Failure> {
    let text = serde_json::to_vec(value).map_err(|error| Failure::while_doing("JSON", error))?;
    let mut response = asset_of("application/json", Body::from(text));
    *response.status_mut() = status;
    Ok(response)
}

fn text(status: StatusCode, text: &'static str) -> Response<Body> {
    let mut response = asset("text/plain; charset=utf-8", text);
    *response.status_mut() = status;
    response
}

fn asset(kind: &'static str, text: &'static str) -> Response<Body> {
    asset_of(kind, Body::from(text))
}

fn asset_of(kind: &'static str, body: Body) -> Response<Body> {
    let mut response = Response::new(body);
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(kind));
    response
}

/// What every answer of the dashboard's own says to the browser.
fn dress(mut response: Response<Body>) -> Response<Body> {
    for (name, value) in [
        (header::CONTENT_SECURITY_POLICY.as_str(), POLICY),
        (header::REFERRER_POLICY.as_str(), "no-referrer"),
        (header::X_CONTENT_TYPE_OPTIONS.as_str(), "nosniff"),
        (header::X_FRAME_OPTIONS.as_str(), "DENY"),
        (header::CACHE_CONTROL.as_str(), "no-store"),
        ("cross-origin-opener-policy", "same-origin"),
        ("cross-origin-resource-policy", "same-origin"),
    ] {
        response.headers_mut().insert(name, HeaderValue::from_static(value));
    }
    response
}

/// A listener that lets in so many at one time; the others wait in the kernel.
struct Bounded {
    listener: TcpListener,
    places: Arc<Semaphore>,
}

/// A connection, its place, and when it has been silent for too long.
struct Guest {
    stream: TcpStream,
    silence: Pin<Box<Sleep>>,
    _place: Option<OwnedSemaphorePermit>,
}

impl Listener for Bounded {
    type Io = Guest;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Guest, SocketAddr) {
        // The semaphore is never closed.
        let place = self.places.clone().acquire_owned().await.ok();
        let (stream, from) = Listener::accept(&mut self.listener).await;
        (Guest { stream, silence: Box::pin(sleep(SILENCE)), _place: place }, from)
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }
}

impl AsyncRead for Guest {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match Pin::new(&mut self.stream).poll_read(cx, buf) {
            // Also one that is sent a request byte by byte gets no further than this.
            Poll::Pending if self.silence.as_mut().poll(cx).is_ready() => {
                Poll::Ready(Err(io::ErrorKind::TimedOut.into()))
            }
            other => other,
        }
    }
}

impl AsyncWrite for Guest {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(cx, bytes);
        if let Poll::Ready(Ok(1..)) = written {
            self.silence.as_mut().reset(Instant::now() + SILENCE);
        }
        written
    }
    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }
    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
