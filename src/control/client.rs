//! HTTP over the gateway's Unix socket; one connection for each request.

use std::future::Future;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use hyper::client::conn::http1::{self, SendRequest};
use hyper::{Method, Request, Response};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::net::UnixStream;

use super::paths;
use super::vocabulary::{
    Event, GatewayView, History, MigrateRequest, MigrationList, MigrationView, PeerList, PlanView, SetRequest, VmList,
};
use super::{ClientError, DoubtList, Problem, ResolutionView, ResolveRequest};
use crate::limits::{CONTROL_EVENT_BYTES_MAX, CONTROL_RESPONSE_BYTES_MAX};
use crate::types::MigrationId;

/// LIMIT: `plan` dials a peer before it answers; everything else answers at once.
const ANSWER_WITHIN: Duration = Duration::from_secs(60);

/// The half of an HTTP connection that moves bytes; `None` once it has ended.
struct Connection(Option<Pin<Box<dyn Future<Output = ()> + Send>>>);

/// Speaks to one gateway.
#[derive(Debug, Clone)]
pub struct Client {
    socket: PathBuf,
}

impl Client {
    /// A client for the gateway on this socket; nothing is connected yet.
    #[must_use]
    pub fn new(socket: impl Into<PathBuf>) -> Self {
        Self { socket: socket.into() }
    }

    /// Where the gateway listens.
    #[must_use]
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// The gateway itself.
    ///
    /// # Errors
    /// As every call: the gateway is not there, says no, or is not understood.
    pub async fn gateway(&self) -> Result<GatewayView, ClientError> {
        self.get(paths::GATEWAY).await
    }

    /// Its VMs.
    ///
    /// # Errors
    /// As [`Client::gateway`].
    pub async fn vms(&self) -> Result<VmList, ClientError> {
        self.get(paths::VMS).await
    }

    /// Its peers.
    ///
    /// # Errors
    /// As [`Client::gateway`].
    pub async fn peers(&self) -> Result<PeerList, ClientError> {
        self.get(paths::PEERS).await
    }

    /// Its migrations.
    ///
    /// # Errors
    /// As [`Client::gateway`].
    pub async fn migrations(&self) -> Result<MigrationList, ClientError> {
        self.get(paths::MIGRATIONS).await
    }

    /// One migration.
    ///
    /// # Errors
    /// As [`Client::gateway`].
    pub async fn migration(&self, id: MigrationId) -> Result<MigrationView, ClientError> {
        self.get(&paths::of(paths::MIGRATION, id)).await
    }

    /// Reports of finished migrations.
    ///
    /// # Errors
    /// As [`Client::gateway`].
    pub async fn history(&self) -> Result<History, ClientError> {
        self.get(paths::HISTORY).await
    }

    /// Has certificates, CRLs and policies read again.
    ///
    /// # Errors
    /// As [`Client::gateway`]; also when one of them is not good, and then what was in force stays in force.
    pub async fn reload(&self) -> Result<GatewayView, ClientError> {
        self.post(paths::RELOAD, &serde_json::json!({})).await
    }

    /// Starts a migration.
    ///
    /// # Errors
    /// As [`Client::gateway`].
    pub async fn start(&self, request: &MigrateRequest) -> Result<MigrationView, ClientError> {
        self.post(paths::MIGRATIONS, request).await
    }

    /// Says what a migration would do.
    ///
    /// # Errors
    /// As [`Client::gateway`].
    pub async fn plan(&self, request: &MigrateRequest) -> Result<PlanView, ClientError> {
        // Asks with a body, changes nothing.
        self.exchange(Method::POST, paths::PLAN, encode(request), false).await
    }

    /// Stops a migration; the VM stays on the source.
    ///
    /// # Errors
    /// As [`Client::gateway`].
    pub async fn cancel(&self, id: MigrationId) -> Result<MigrationView, ClientError> {
        self.post(&paths::of(paths::CANCEL, id), &serde_json::json!({})).await
    }

    /// Changes a migration.
    ///
    /// # Errors
    /// As [`Client::gateway`].
    pub async fn set(&self, id: MigrationId, change: &SetRequest) -> Result<MigrationView, ClientError> {
        self.post(&paths::of(paths::SET, id), change).await
    }

    /// VMs in doubt, and what operators have proposed for them.
    ///
    /// # Errors
    /// As [`Client::gateway`].
    pub async fn doubts(&self) -> Result<DoubtList, ClientError> {
        self.get(paths::DOUBTS).await
    }

    /// Proposes, approves or withdraws what is to become of a VM in doubt.
    ///
    /// # Errors
    /// As [`Client::gateway`].
    pub async fn resolve(&self, id: MigrationId, request: &ResolveRequest) -> Result<ResolutionView, ClientError> {
        self.post(&paths::of(paths::RESOLVE, id), request).await
    }

    /// Follows a migration to its end.
    ///
    /// # Errors
    /// As [`Client::gateway`].
    pub async fn watch(&self, id: MigrationId) -> Result<Watch, ClientError> {
        let (mut sender, mut connection) = self.connect().await?;
        let request = request(Method::GET, &paths::of(paths::EVENTS, id), Bytes::new());
        let answered = tokio::time::timeout(ANSWER_WITHIN, drive(&mut connection, self.send(&mut sender, request, false))).await;
        let response = answered.map_err(|_| self.silent(false))??;
        if !response.status().is_success() {
            let body = drive(&mut connection, self.collect(response, false)).await?;
            return Err(self.refusal(body.0, &body.1));
        }
        Ok(Watch { client: self.clone(), connection, _sender: sender, body: response.into_body(), buffer: BytesMut::new(), ended: false })
    }

    /// GET.
    ///
    /// # Errors
    /// As [`Client::gateway`].
    pub async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, ClientError> {
        self.exchange(Method::GET, path, Bytes::new(), false).await
    }

    /// POST, to change something.
    ///
    /// # Errors
    /// As [`Client::gateway`].
    pub async fn post<T: DeserializeOwned>(&self, path: &str, body: &impl Serialize) -> Result<T, ClientError> {
        self.exchange(Method::POST, path, encode(body), true).await
    }

    async fn exchange<T: DeserializeOwned>(&self, method: Method, path: &str, body: Bytes, changes: bool) -> Result<T, ClientError> {
        let exchange = async {
            let (mut sender, mut connection) = self.connect().await?;
            let talk = async {
                let response = self.send(&mut sender, request(method, path, body), changes).await?;
                self.collect(response, changes).await
            };
            drive(&mut connection, talk).await
        };
        let (status, body) = tokio::time::timeout(ANSWER_WITHIN, exchange).await.map_err(|_| self.silent(changes))??;
        if !(200..300).contains(&status) {
            return Err(self.refusal(status, &body));
        }
        serde_json::from_slice(&body).map_err(|error| self.answer(error.to_string()))
    }

    async fn connect(&self) -> Result<(SendRequest<Full<Bytes>>, Connection), ClientError> {
        let stream = UnixStream::connect(&self.socket).await.map_err(|source| match source.kind() {
            ErrorKind::PermissionDenied => ClientError::NotPermitted { socket: self.socket.clone(), source },
            _ => ClientError::NotRunning { socket: self.socket.clone(), source },
        })?;
        let (sender, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(|error| self.lost(false, error))?;
        // Its error is the sender's too.
        Ok((sender, Connection(Some(Box::pin(async move { drop(connection.await) })))))
    }

    async fn send(
        &self,
        sender: &mut SendRequest<Full<Bytes>>,
        request: Request<Full<Bytes>>,
        changes: bool,
    ) -> Result<Response<Incoming>, ClientError> {
        sender.send_request(request).await.map_err(|error| self.lost(changes, error))
    }

    async fn collect(&self, response: Response<Incoming>, changes: bool) -> Result<(u16, Bytes), ClientError> {
        let status = response.status().as_u16();
        let body = Limited::new(response.into_body(), CONTROL_RESPONSE_BYTES_MAX).collect().await;
        let body = body.map_err(|source| ClientError::Lost { socket: self.socket.clone(), changes, source: Some(source) })?;
        Ok((status, body.to_bytes()))
    }

    fn refusal(&self, status: u16, body: &[u8]) -> ClientError {
        match serde_json::from_slice::<Problem>(body) {
            Ok(problem) => ClientError::Refused(Box::new(problem)),
            Err(_) => self.answer(format!("status {status} without a problem")),
        }
    }

    fn lost(&self, changes: bool, source: hyper::Error) -> ClientError {
        ClientError::Lost { socket: self.socket.clone(), changes, source: Some(Box::new(source)) }
    }

    fn silent(&self, changes: bool) -> ClientError {
        ClientError::Silent { socket: self.socket.clone(), changes }
    }

    fn answer(&self, reason: String) -> ClientError {
        ClientError::Answer { socket: self.socket.clone(), reason }
    }
}

/// The events of one migration, as they come.
pub struct Watch {
    client: Client,
    connection: Connection,
    /// Dropping it would end the connection.
    _sender: SendRequest<Full<Bytes>>,
    body: Incoming,
    buffer: BytesMut,
    ended: bool,
}

impl std::fmt::Debug for Watch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Watch").field("client", &self.client).field("ended", &self.ended).finish_non_exhaustive()
    }
}

impl Watch {
    /// The next event; `None` after the report. Nothing is lost when the future is dropped.
    ///
    /// # Errors
    /// The gateway went away, or sent something else.
    pub async fn next(&mut self) -> Result<Option<Event>, ClientError> {
        loop {
            if self.ended {
                return Ok(None);
            }
            if let Some(end) = self.buffer.iter().position(|byte| *byte == b'\n') {
                let line = self.buffer.split_to(end + 1);
                if line.trim_ascii().is_empty() {
                    continue;
                }
                let event = Event::from_line(&line);
                let event = event.map_err(|source| ClientError::Event { socket: self.client.socket.clone(), source })?;
                self.ended = matches!(event, Event::Report(_));
                return Ok(Some(event));
            }
            if self.buffer.len() > CONTROL_EVENT_BYTES_MAX {
                return Err(self.client.answer(format!("an event of more than {CONTROL_EVENT_BYTES_MAX} bytes")));
            }
            match drive(&mut self.connection, self.body.frame()).await {
                Some(Ok(frame)) => self.buffer.extend_from_slice(frame.data_ref().map_or(&[], |data| data.as_ref())),
                Some(Err(source)) => return Err(self.client.lost(false, source)),
                None => return Err(ClientError::Lost { socket: self.client.socket.clone(), changes: false, source: None }),
            }
        }
    }
}

fn request(method: Method, path: &str, body: Bytes) -> Request<Full<Bytes>> {
    let mut request = Request::new(Full::new(body));
    *request.method_mut() = method;
    // Paths are ours: constants and hexadecimal digits.
    *request.uri_mut() = path.parse().unwrap_or_default();
    let headers = request.headers_mut();
    headers.insert(hyper::header::HOST, hyper::header::HeaderValue::from_static("sealane"));
    headers.insert(hyper::header::CONTENT_TYPE, hyper::header::HeaderValue::from_static("application/json"));
    request
}

fn encode(body: &impl Serialize) -> Bytes {
    // Our own plain structs; an empty body would be refused by the gateway.
    serde_json::to_vec(body).unwrap_or_default().into()
}

/// Lets the connection work while something waits for it.
async fn drive<T>(connection: &mut Connection, wanted: impl Future<Output = T>) -> T {
    tokio::pin!(wanted);
    if let Some(work) = &mut connection.0 {
        tokio::select! {
            biased;
            value = &mut wanted => return value,
            () = work => {}
        }
        // What it has read before it ended is still to be had.
        connection.0 = None;
    }
    wanted.await
}
