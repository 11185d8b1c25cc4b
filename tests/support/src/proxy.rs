//! A proxy between client and server that can lose, delay and withhold what the server says.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, watch};
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::{Instant, sleep, sleep_until};

/// What the proxy does, mostly with the server's replies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Passes them on.
    Pass,
    /// Loses the next one, cuts that connection, and passes all others on.
    LoseNext,
    /// Loses the next one, and passes all others on as if nothing had happened: each then looks like the answer to the
    /// request before its own.
    SwallowNext,
    /// Keeps each of them back for so long.
    Delay(Duration),
    /// Cuts the connection that brings the next request other than a ping, and delivers that request so much later all
    /// the same.
    DeliverNextLate(Duration),
    /// Does the same, but cuts the connection only later. What comes on it until then is lost.
    DeliverNextLateAndCut {
        /// After how long the connection is cut.
        cut: Duration,
        /// After how long the request is delivered.
        delay: Duration,
    },
    /// Silently loses all replies on the present connections; new connections work.
    Silence,
    /// Sends this instead of each of them.
    Instead(&'static [u8]),
    /// Passes nothing on, in either direction. What is held back is passed on once the mode is another.
    Hold,
    /// Puts garbage in the place of the next one, and passes all others on.
    GarbleNext,
}

/// Forwards connections to a server, as its mode says. Ends when dropped.
#[derive(Debug)]
pub struct Proxy {
    port: u16,
    control: Arc<Mutex<Control>>,
    switches: Switches,
    task: AbortHandle,
}

/// What takes effect on connections while they wait.
#[derive(Clone, Debug)]
struct Switches {
    held: watch::Sender<bool>,
    /// Cuts all connections when it changes.
    cuts: watch::Sender<u64>,
    /// Closes all connections in the direction of the client when it changes.
    half_cuts: watch::Sender<u64>,
}

impl Switches {
    /// Waits while nothing is to be passed on.
    async fn passable(&self) {
        // There is a sender, which is `self`.
        drop(self.held.subscribe().wait_for(|held| !held).await);
    }
}

#[derive(Debug)]
struct Control {
    /// The server that new connections lead to.
    port: u16,
    mode: Mode,
    connections: u64,
    /// Connections up to this number are silent.
    silenced: u64,
    lost: u64,
    /// The last request that is delivered late.
    late: Vec<u8>,
    /// What a request has in it whose reply is to be lost, and how many such requests come before it.
    losing: Option<(Vec<u8>, u32)>,
}

impl Control {
    /// Loses the reply to this request, if that is to be.
    fn note(&mut self, request: &[u8]) {
        let Some((part, before)) = &mut self.losing else { return };
        if !request.windows(part.len()).any(|window| window == part) {
            return;
        }
        match before.checked_sub(1) {
            Some(fewer) => *before = fewer,
            None => (self.losing, self.mode) = (None, Mode::LoseNext),
        }
    }
}

impl Proxy {
    /// Listens on a free port, for the server at `port`.
    ///
    /// # Panics
    ///
    /// When there is no free port.
    pub async fn start(port: u16) -> Self {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.expect("a free port");
        let own_port = listener.local_addr().expect("its address").port();
        let control = Arc::new(Mutex::new(Control {
            port,
            mode: Mode::Pass,
            connections: 0,
            silenced: 0,
            lost: 0,
            late: Vec::new(),
            losing: None,
        }));
        let new = || watch::channel(0).0;
        let switches = Switches { held: watch::channel(false).0, cuts: new(), half_cuts: new() };
        let task = tokio::spawn(accept(listener, control.clone(), switches.clone())).abort_handle();
        Self { port: own_port, control, switches, task }
    }

    /// For [`Locker::connect`].
    pub fn url(&self) -> String {
        format!("redis://127.0.0.1:{}", self.port)
    }

    /// Changes what happens to replies from now on.
    pub fn set(&self, mode: Mode) {
        let mut control = lock(&self.control);
        control.mode = mode;
        if mode == Mode::Silence {
            control.silenced = control.connections;
        }
        self.switches.held.send_replace(mode == Mode::Hold);
    }

    /// Loses the reply to a request that has this text in it, after so many others that have, and cuts the connection:
    /// as [`Mode::LoseNext`].
    pub fn lose_reply_to(&self, text: &str, before: u32) {
        lock(&self.control).losing = Some((text.as_bytes().to_vec(), before));
    }

    /// Leads new connections to the server at this port, as a name does after a failover. Those that there are stay.
    pub fn lead_to(&self, port: u16) {
        lock(&self.control).port = port;
    }

    /// Cuts all present connections.
    pub fn cut(&self) {
        self.switches.cuts.send_modify(|cuts| *cuts += 1);
    }

    /// Closes all present connections in the direction of the client. Requests still pass.
    pub fn half_close(&self) {
        self.switches.half_cuts.send_modify(|cuts| *cuts += 1);
    }

    /// Returns the last request that is delivered late, or was.
    pub fn late_request(&self) -> Vec<u8> {
        lock(&self.control).late.clone()
    }

    /// Returns how many replies were lost.
    pub fn lost(&self) -> u64 {
        lock(&self.control).lost
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.task.abort();
    }
}

fn lock(control: &Mutex<Control>) -> std::sync::MutexGuard<'_, Control> {
    control.lock().unwrap_or_else(PoisonError::into_inner)
}

async fn accept(listener: TcpListener, control: Arc<Mutex<Control>>, switches: Switches) {
    // Ends all connections with the proxy.
    let mut connections = JoinSet::new();
    while let Ok((client, _)) = listener.accept().await {
        let port = lock(&control).port;
        let Ok(server) = TcpStream::connect(("127.0.0.1", port)).await else { continue };
        let number = {
            let mut control = lock(&control);
            control.connections += 1;
            control.connections
        };
        let ((from_client, to_client), (from_server, to_server)) = (client.into_split(), server.into_split());
        let (control, switches, mut cuts) = (control.clone(), switches.clone(), switches.cuts.subscribe());
        connections.spawn(async move {
            tokio::select! {
                () = forward_requests(from_client, to_server, control.clone(), switches.clone()) => {}
                () = forward_answers(from_server, to_client, number, control, switches) => {}
                _ = cuts.changed() => {}
            }
        });
    }
}

async fn forward_requests(
    mut from: OwnedReadHalf,
    mut to: OwnedWriteHalf,
    control: Arc<Mutex<Control>>,
    switches: Switches,
) {
    let mut buffer = vec![0; 64 * 1024];
    while let Ok(length) = from.read(&mut buffer).await {
        let Some(request) = buffer.get(..length).filter(|request| !request.is_empty()) else { return };
        let late = {
            let mut control = lock(&control);
            control.note(request);
            let late = match control.mode {
                // A subscriber's, which comes at any time.
                _ if request == b"*1\r\n$4\r\nPING\r\n" => None,
                Mode::DeliverNextLate(delay) => Some((Duration::ZERO, delay)),
                Mode::DeliverNextLateAndCut { cut, delay } => Some((cut, delay)),
                _ => None,
            };
            if late.is_some() {
                control.mode = Mode::Pass;
                control.late = request.to_vec();
                control.lost += 1;
            }
            late
        };
        if let Some((cut, delay)) = late {
            let request = request.to_vec();
            tokio::spawn(async move {
                sleep(delay).await;
                to.write_all(&request).await
            });
            sleep(cut).await;
            return;
        }
        switches.passable().await;
        if to.write_all(request).await.is_err() {
            return;
        }
    }
}

async fn forward_answers(
    from: OwnedReadHalf,
    mut to: OwnedWriteHalf,
    number: u64,
    control: Arc<Mutex<Control>>,
    switches: Switches,
) {
    let mut half_cuts = switches.half_cuts.subscribe();
    // Those that are on their way overlap, as on a long line.
    let (sender, mut under_way) = mpsc::unbounded_channel::<(Instant, Vec<u8>)>();
    let arrivals = async {
        while let Some((at, answer)) = under_way.recv().await {
            sleep_until(at).await;
            switches.passable().await;
            if to.write_all(&answer).await.is_err() {
                return;
            }
        }
    };
    let forward = async { tokio::join!(read_answers(from, sender, number, control), arrivals) };
    tokio::select! {
        _ = forward => return,
        _ = half_cuts.changed() => {}
    }
    // The client may have closed it already.
    drop(to.shutdown().await);
    std::future::pending::<()>().await;
}

/// Puts what the server says under way, until the connection is to end.
async fn read_answers(
    mut from: OwnedReadHalf,
    under_way: mpsc::UnboundedSender<(Instant, Vec<u8>)>,
    number: u64,
    control: Arc<Mutex<Control>>,
) {
    let mut buffer = vec![0; 64 * 1024];
    while let Ok(length) = from.read(&mut buffer).await {
        let Some(answer) = buffer.get(..length).filter(|answer| !answer.is_empty()) else { return };
        let mode = {
            let mut control = lock(&control);
            if number <= control.silenced {
                continue;
            }
            let mode = control.mode;
            if matches!(mode, Mode::LoseNext | Mode::SwallowNext | Mode::GarbleNext) {
                control.lost += 1;
                control.mode = Mode::Pass;
            }
            mode
        };
        let mut answer = answer.to_vec();
        let delay = match mode {
            Mode::LoseNext => return,
            Mode::SwallowNext => continue,
            Mode::GarbleNext => {
                // Neither the beginning of a reply nor a digit.
                answer.fill(0xff);
                Duration::ZERO
            }
            Mode::Instead(other) => {
                answer = other.to_vec();
                Duration::ZERO
            }
            Mode::Delay(delay) => delay,
            Mode::Pass | Mode::Silence | Mode::Hold | Mode::DeliverNextLate(_) | Mode::DeliverNextLateAndCut { .. } => {
                Duration::ZERO
            }
        };
        if under_way.send((Instant::now() + delay, answer)).is_err() {
            return;
        }
    }
}
