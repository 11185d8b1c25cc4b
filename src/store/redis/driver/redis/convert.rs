//! redis-rs' values and errors in our words.

use std::error::Error;
use std::io;
use std::sync::Arc;

use bytes::Bytes;
use redis::{Cmd, ErrorKind, ServerError, Value as RedisValue};

use super::super::Value;
use crate::{RedisError, RedisErrorKind};

/// Returns a command as redis-rs takes it.
pub(super) fn command(name: &str, args: &[Bytes]) -> Cmd {
    let length = name.len() + args.iter().map(Bytes::len).sum::<usize>();
    let mut command = Cmd::with_capacity(1 + args.len(), length);
    command.arg(name);
    for arg in args {
        command.arg(&arg[..]);
    }
    command
}

/// Returns a reply, or the error that it is. redis-rs passes errors on as values, in arrays also.
pub(super) fn reply(value: RedisValue) -> Result<Value, RedisError> {
    let all = |parts: Vec<RedisValue>| parts.into_iter().map(reply).collect::<Result<_, _>>();
    Ok(match value {
        RedisValue::Nil => Value::Nil,
        RedisValue::Int(number) => Value::Integer(number),
        RedisValue::BulkString(bytes) => Value::Bytes(bytes.into()),
        RedisValue::Okay => Value::Bytes(Bytes::from_static(b"OK")),
        RedisValue::SimpleString(text) | RedisValue::VerbatimString { text, .. } => Value::Bytes(text.into()),
        RedisValue::Boolean(is_true) => Value::Integer(is_true.into()),
        RedisValue::Double(number) => Value::Bytes(number.to_string().into()),
        RedisValue::Array(parts) | RedisValue::Set(parts) => Value::Array(all(parts)?),
        RedisValue::Map(pairs) => Value::Array(all(pairs.into_iter().flat_map(|(key, value)| [key, value]).collect())?),
        RedisValue::Attribute { data, .. } => reply(*data)?,
        RedisValue::ServerError(refusal) => return Err(refused(&refusal)),
        other => {
            let text = format!("the reply has an unexpected form: {}", form_of(&other));
            return Err(RedisError::new(RedisErrorKind::Protocol, text));
        }
    })
}

fn form_of(value: &RedisValue) -> &'static str {
    match value {
        RedisValue::Push { .. } => "a push",
        _ => "a big number, or one that is new",
    }
}

/// Returns a refusal of the server as the server has written it.
fn refused(refusal: &ServerError) -> RedisError {
    let text = match refusal.details() {
        Some(details) => format!("{} {details}", refusal.code()),
        None => refusal.code().to_owned(),
    };
    RedisError::new(RedisErrorKind::Unknown, text).with_source(redis::RedisError::from(refusal.clone()))
}

/// Returns the error of a call, or of a connection.
pub(super) fn failed(error: redis::RedisError) -> RedisError {
    let (kind, text) = match error.kind() {
        _ if error.is_timeout() => (RedisErrorKind::Timeout, "the server did not reply in time".to_owned()),
        ErrorKind::Io => (RedisErrorKind::Io, io_text(&error)),
        ErrorKind::Parse => (RedisErrorKind::Parse, error.to_string()),
        ErrorKind::UnexpectedReturnType | ErrorKind::RESP3NotSupported => (RedisErrorKind::Protocol, error.to_string()),
        ErrorKind::AuthenticationFailed => (RedisErrorKind::Auth, error.to_string()),
        ErrorKind::InvalidClientConfig | ErrorKind::Client => (RedisErrorKind::Config, error.to_string()),
        ErrorKind::MasterNameNotFoundBySentinel
        | ErrorKind::NoValidReplicasFoundBySentinel
        | ErrorKind::EmptySentinelList => (RedisErrorKind::Sentinel, error.to_string()),
        ErrorKind::ClusterConnectionNotFound => (RedisErrorKind::Cluster, error.to_string()),
        _ => match (error.code(), error.detail()) {
            (Some(code), Some(details)) => (RedisErrorKind::Unknown, format!("{code} {details}")),
            (Some(code), None) => (RedisErrorKind::Unknown, code.to_owned()),
            (None, _) => (RedisErrorKind::Unknown, error.to_string()),
        },
    };
    RedisError::new(kind, text).with_source(error)
}

/// Returns the system's error as `Debug` writes it, which names its kind.
fn io_text(error: &redis::RedisError) -> String {
    let io = error.source().and_then(|source| {
        let shared = source.downcast_ref::<Arc<dyn Error + Send + Sync>>().and_then(|it| it.downcast_ref());
        shared.or_else(|| source.downcast_ref::<io::Error>())
    });
    io.map_or_else(|| error.to_string(), |io| format!("{io:?}"))
}

/// Returns the system's error, as fred does.
pub(super) fn io_failed(error: io::Error) -> RedisError {
    RedisError::new(RedisErrorKind::Io, format!("{error:?}")).with_source(error)
}

/// The error of a call whose time is over.
pub(super) fn late() -> RedisError {
    RedisError::new(RedisErrorKind::Timeout, "the server did not reply in time")
}
