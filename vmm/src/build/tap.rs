//! Taps from where a configuration says they are.

use std::io;
use std::os::fd::RawFd;

use api::{ConfigError, NetConfig, TapSource};
use devices::virtio::net::{self, NetError, Offloads, Tap, TapError};
use thiserror::Error;

use super::rates;
use crate::host::inherited;

/// Why there is no network.
#[derive(Debug, Error)]
pub(crate) enum NetworkError {
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error(transparent)]
    Net(#[from] NetError),
    #[error(transparent)]
    Tap(#[from] TapError),
    #[error("file descriptor {fd} is not open")]
    NotOpen { fd: RawFd, source: io::Error },
    #[error("duplicate a tap's file descriptor")]
    Duplicate(#[source] io::Error),
}

/// The device that `config` describes. Its taps are its own: descriptors that were passed or
/// inherited stay open beside them, for another life of the VM.
pub(crate) fn device(config: &NetConfig) -> Result<net::Net, NetworkError> {
    let taps = match config.source()? {
        TapSource::Name(name) => Tap::open(name, config.pairs())?,
        TapSource::Inherited(numbers) => numbers
            .iter()
            .map(|fd| {
                let tap = inherited::duplicate(*fd);
                let tap = tap.map_err(|source| NetworkError::NotOpen { fd: *fd, source })?;
                Ok(Tap::inherit(tap)?)
            })
            .collect::<Result<_, NetworkError>>()?,
        TapSource::Passed(fds) => fds
            .iter()
            .map(|fd| {
                Ok(Tap::inherit(
                    fd.try_clone().map_err(NetworkError::Duplicate)?,
                )?)
            })
            .collect::<Result<_, NetworkError>>()?,
    };
    Ok(net::Net::new(net::NetConfig {
        taps,
        mac: config.mac.0,
        mtu: config.mtu,
        queue_size: config.queue_size,
        offloads: Offloads {
            csum: config.offload_csum,
            tso: config.offload_tso,
            uso: config.offload_ufo,
        },
        rates: rates(&config.rate_limiter_config),
    })?)
}
