//! A fleet of processes shares three licences, and one of them is killed: its licence comes back.
//!
//!     cargo run --example permits
//!
//! Five workers, each a process of its own, want a licence for each of their jobs. One worker is killed while it has
//! one. The others go on with two until the ttl of the dead one's permit ends. This needs a server: the one that
//! `REDIS_URL` names, or else it starts its own redis-server, if that is installed.

use std::env;
use std::error::Error;
use std::path::PathBuf;
use std::process::{Child, Command};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tenure::Locker;
use tokio::time::sleep;

const KEY: &str = "licences";
const LICENCES: usize = 3;
const WORKERS: usize = 5;
const TTL: Duration = Duration::from_millis(1_500);

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let role = env::args().nth(1);
    match (role.as_deref(), env::var("REDIS_URL")) {
        (Some("worker"), Ok(url)) => work(&url).await,
        (None, Ok(url)) => {
            println!("The permits are kept on the server that REDIS_URL names.\n");
            play(&url).await
        }
        (None, Err(_)) => {
            let Ok(server) = OwnServer::start().await else {
                println!("This needs a server: set REDIS_URL, or install redis-server.");
                return Ok(());
            };
            println!("REDIS_URL is not set: the permits are kept on a redis-server started for this.\n");
            play(&server.url).await
        }
        (Some(other), _) => Err(format!("unknown role `{other}`").into()),
    }
}

/// A worker: it does three jobs, each with a licence.
async fn work(url: &str) -> Result<(), Box<dyn Error>> {
    // The metadata says who it is to whoever looks.
    let (locker, name) = (Locker::builder().ttl(TTL).connect(url).await?, std::process::id().to_string());
    for job in 1..=3 {
        let permit = locker.permit(KEY, LICENCES).metadata(name.clone()).await?;
        let taken = locker.holders(KEY).await?.len();
        say(&format!("has a licence for job {job}; {taken} of {LICENCES} are taken"));
        // If the permit is lost, the job is dropped, as somebody else may have the licence.
        permit.protect(sleep(Duration::from_millis(400))).await?;
        permit.release().await?;
    }
    Ok(())
}

/// Starts the workers, and kills one that has a licence.
async fn play(url: &str) -> Result<(), Box<dyn Error>> {
    let locker = Locker::connect(url).await?;
    let mut workers: Vec<Child> = (0..WORKERS).map(|_| start(url)).collect::<Result<_, _>>()?;
    let mut victim = loop {
        sleep(Duration::from_millis(10)).await;
        let holders = locker.holders(KEY).await?;
        let has_one = |worker: &Child| holders.iter().any(|held| held.metadata == worker.id().to_string().as_bytes());
        if let (Some(place), LICENCES) = (workers.iter().position(has_one), holders.len()) {
            break workers.swap_remove(place);
        }
    };
    victim.kill()?;
    victim.wait()?;
    say(&format!("process {} is killed; its licence stays taken until its ttl ends", victim.id()));
    for mut worker in workers {
        if !worker.wait()?.success() {
            return Err("a worker failed".into());
        }
    }
    // All three can be had again.
    let mut permits = Vec::new();
    for _ in 0..LICENCES {
        permits.push(locker.permit(KEY, LICENCES).wait_at_most(TTL).await?);
    }
    say(&format!("all {} licences are back", permits.len()));
    for permit in permits {
        permit.release().await?;
    }
    Ok(())
}

/// Starts this program again as a worker.
fn start(url: &str) -> std::io::Result<Child> {
    Command::new(env::current_exe()?).arg("worker").env("REDIS_URL", url).spawn()
}

/// Prints a line with the time and the id of the process.
fn say(what: &str) {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    println!("{:>2}.{:03} s  [process {}] {what}", now.as_secs() % 60, now.subsec_millis(), std::process::id());
}

/// A redis-server for this example.
struct OwnServer {
    process: Child,
    socket: PathBuf,
    url: String,
}

impl OwnServer {
    async fn start() -> Result<Self, Box<dyn Error>> {
        let socket = env::temp_dir().join(format!("tenure-permits-{}.sock", std::process::id()));
        let mut command = Command::new("redis-server");
        command.args(["--port", "0", "--save", "", "--unixsocket"]).arg(&socket);
        let process = command.stdout(std::process::Stdio::null()).spawn()?;
        let url = format!("redis+unix://{}", socket.display());
        let server = Self { process, socket, url };
        for _ in 0..200 {
            if Locker::connect(&server.url).await.is_ok() {
                return Ok(server);
            }
            sleep(Duration::from_millis(10)).await;
        }
        Err("redis-server did not start".into())
    }
}

impl Drop for OwnServer {
    fn drop(&mut self) {
        let ended = self.process.kill().and_then(|()| self.process.wait());
        if let Err(error) = ended.and_then(|_| std::fs::remove_file(&self.socket)) {
            eprintln!("could not clean up after redis-server: {error}");
        }
    }
}
