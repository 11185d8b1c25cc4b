//! TLS over a stream of our own, by the library that the features choose: the platform's where both are enabled.

use tokio::net::TcpStream;

use super::stream::AnyStream;
use crate::RedisError;
use crate::store::redis::url::Target;

/// What makes a TLS connection, if there is to be one.
#[derive(Clone)]
pub(super) enum Tls {
    Off,
    #[cfg(any(feature = "rustls", feature = "native-tls"))]
    On(library::Connector),
}

impl Tls {
    /// # Errors
    ///
    /// Says why the TLS library can't be set up.
    pub(super) fn of(target: &Target) -> Result<Self, RedisError> {
        match target.has_tls {
            false => Ok(Self::Off),
            #[cfg(any(feature = "rustls", feature = "native-tls"))]
            true => {
                let setup = |error: RedisError| {
                    let text = format!("can't set up TLS: {}", error.details());
                    error.with_text(text)
                };
                library::connector().map(Self::On).map_err(setup)
            }
            // The URL was refused.
            #[cfg(not(any(feature = "rustls", feature = "native-tls")))]
            true => Err(RedisError::new(crate::RedisErrorKind::Config, "TLS needs a feature of tenure")),
        }
    }

    #[cfg_attr(not(any(feature = "rustls", feature = "native-tls")), expect(clippy::unused_async))]
    pub(super) async fn wrap(&self, stream: TcpStream, host: &str) -> Result<AnyStream, RedisError> {
        match self {
            Self::Off => {
                let _ = host;
                Ok(Box::new(stream))
            }
            #[cfg(any(feature = "rustls", feature = "native-tls"))]
            Self::On(connector) => library::wrap(connector, stream, host).await,
        }
    }
}

#[cfg(feature = "native-tls")]
mod library {
    use tokio::net::TcpStream;
    use tokio_native_tls::{TlsConnector, native_tls};

    use super::AnyStream;
    use crate::{RedisError, RedisErrorKind};

    pub(super) type Connector = TlsConnector;

    pub(super) fn connector() -> Result<Connector, RedisError> {
        Ok(native_tls::TlsConnector::new().map_err(failed)?.into())
    }

    pub(super) async fn wrap(connector: &Connector, stream: TcpStream, host: &str) -> Result<AnyStream, RedisError> {
        Ok(Box::new(connector.connect(host, stream).await.map_err(failed)?))
    }

    fn failed(error: native_tls::Error) -> RedisError {
        RedisError::new(RedisErrorKind::Tls, format!("{error:?}")).with_source(error)
    }
}

#[cfg(all(feature = "rustls", not(feature = "native-tls")))]
mod library {
    use std::sync::Arc;

    use tokio::net::TcpStream;
    use tokio_rustls::TlsConnector;
    use tokio_rustls::rustls::pki_types::ServerName;
    use tokio_rustls::rustls::{ClientConfig, RootCertStore, crypto};

    use super::super::convert;
    use super::AnyStream;
    use crate::{RedisError, RedisErrorKind};

    pub(super) type Connector = TlsConnector;

    /// Names ring as the provider: without one, rustls panics unless the process has installed one.
    pub(super) fn connector() -> Result<Connector, RedisError> {
        let mut found = rustls_native_certs::load_native_certs();
        if let Some(error) = found.errors.pop() {
            return Err(RedisError::new(RedisErrorKind::Tls, format!("{error:?}")).with_source(error));
        }
        let mut roots = RootCertStore::empty();
        for certificate in found.certs {
            roots.add(certificate).map_err(failed)?;
        }
        let provider = Arc::new(crypto::ring::default_provider());
        let config = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
        let config = config.map_err(failed)?.with_root_certificates(roots).with_no_client_auth();
        Ok(TlsConnector::from(Arc::new(config)))
    }

    pub(super) async fn wrap(connector: &Connector, stream: TcpStream, host: &str) -> Result<AnyStream, RedisError> {
        let name = ServerName::try_from(host.to_owned());
        let name = name.map_err(|error| RedisError::new(RedisErrorKind::Tls, format!("{error:?}")))?;
        Ok(Box::new(connector.connect(name, stream).await.map_err(convert::io_failed)?))
    }

    fn failed(error: tokio_rustls::rustls::Error) -> RedisError {
        RedisError::new(RedisErrorKind::Tls, format!("{error:?}")).with_source(error)
    }
}
