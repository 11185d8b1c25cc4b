//! A proxy between client and server that can lose, delay and withhold what the server says.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
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
}

/// Forwards connections to a server, as its mode says. Ends when dropped.
#[derive(Debug)]
pub struct Proxy {
    port: u16,
    control: Arc<Mutex<Control>>,
    task: AbortHandle,
}

#[derive(Debug)]
struct Control {
    mode: Mode,
    connections: u64,
    /// Connections up to this number are silent.
    silenced: u64,
    lost: u64,
    /// The last request that is delivered late.
    late: Vec<u8>,
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
        let control =
            Arc::new(Mutex::new(Control { mode: Mode::Pass, connections: 0, silenced: 0, lost: 0, late: Vec::new() }));
        let task = tokio::spawn(accept(listener, port, control.clone())).abort_handle();
        Self { port: own_port, control, task }
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

async fn accept(listener: TcpListener, port: u16, control: Arc<Mutex<Control>>) {
    // Ends all connections with the proxy.
    let mut connections = JoinSet::new();
    while let Ok((client, _)) = listener.accept().await {
        let Ok(server) = TcpStream::connect(("127.0.0.1", port)).await else { continue };
        let number = {
            let mut control = lock(&control);
            control.connections += 1;
            control.connections
        };
        let ((from_client, to_client), (from_server, to_server)) = (client.into_split(), server.into_split());
        let control = control.clone();
        connections.spawn(async move {
            tokio::select! {
                () = forward_requests(from_client, to_server, control.clone()) => {}
                () = forward_answers(from_server, to_client, number, control) => {}
            }
        });
    }
}

async fn forward_requests(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, control: Arc<Mutex<Control>>) {
    let mut buffer = vec![0; 64 * 1024];
    while let Ok(length) = from.read(&mut buffer).await {
        let Some(request) = buffer.get(..length).filter(|request| !request.is_empty()) else { return };
        let late = {
            let mut control = lock(&control);
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
        if to.write_all(request).await.is_err() {
            return;
        }
    }
}

async fn forward_answers(from: OwnedReadHalf, mut to: OwnedWriteHalf, number: u64, control: Arc<Mutex<Control>>) {
    // Those that are on their way overlap, as on a long line.
    let (sender, mut under_way) = mpsc::unbounded_channel::<(Instant, Vec<u8>)>();
    let arrivals = async {
        while let Some((at, answer)) = under_way.recv().await {
            sleep_until(at).await;
            if to.write_all(&answer).await.is_err() {
                return;
            }
        }
    };
    tokio::join!(read_answers(from, sender, number, control), arrivals);
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
            if mode == Mode::LoseNext || mode == Mode::SwallowNext {
                control.lost += 1;
                control.mode = Mode::Pass;
            }
            mode
        };
        let (delay, answer) = match mode {
            Mode::LoseNext => return,
            Mode::SwallowNext => continue,
            Mode::Delay(delay) => (delay, answer),
            Mode::Instead(other) => (Duration::ZERO, other),
            Mode::Pass | Mode::Silence | Mode::DeliverNextLate(_) | Mode::DeliverNextLateAndCut { .. } => {
                (Duration::ZERO, answer)
            }
        };
        if under_way.send((Instant::now() + delay, answer.to_vec())).is_err() {
            return;
        }
    }
}
