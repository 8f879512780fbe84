//! Messages of the control queues (virtio 1.3 §5.3.6.2, Multiport Device Operation).

use serde::{Deserialize, Serialize};

/// Length of `struct virtio_console_control`, which starts each message.
pub(super) const HEADER_LEN: usize = 8;

const DEVICE_READY: u16 = 0;
const DEVICE_ADD: u16 = 1;
const PORT_READY: u16 = 3;
const CONSOLE_PORT: u16 = 4;
const RESIZE: u16 = 5;
const PORT_OPEN: u16 = 6;
const PORT_NAME: u16 = 7;

/// What the driver says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum FromDriver {
    DeviceReady,
    PortReady { port: usize },
    PortOpen { port: usize, open: bool },
}

impl FromDriver {
    /// Reads a message. `None` if it says nothing the device could follow. Port numbers are below
    /// `ports`.
    pub(super) fn parse(message: [u8; HEADER_LEN], ports: usize) -> Option<Self> {
        let [i0, i1, i2, i3, e0, e1, v0, v1] = message;
        let port = usize::try_from(u32::from_le_bytes([i0, i1, i2, i3])).ok()?;
        let event = u16::from_le_bytes([e0, e1]);
        let value = u16::from_le_bytes([v0, v1]);
        match (event, value) {
            (DEVICE_READY, 1) => Some(Self::DeviceReady),
            (PORT_READY, 1) if port < ports => Some(Self::PortReady { port }),
            (PORT_OPEN, 0 | 1) if port < ports => Some(Self::PortOpen {
                port,
                open: value == 1,
            }),
            _ => None,
        }
    }
}

/// What the device has yet to say about a port. Saying it twice is no better than once, so this
/// does not grow however often the driver asks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Untold {
    pub(super) add: bool,
    pub(super) console: bool,
    pub(super) size: bool,
    pub(super) name: bool,
    pub(super) open: bool,
}

/// Width and height of a console, in characters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Size {
    pub(super) cols: u16,
    pub(super) rows: u16,
}

impl Untold {
    /// The first message that is due, which then no longer is.
    pub(super) fn next(
        &mut self,
        port: usize,
        name: &str,
        size: Option<Size>,
        open: bool,
    ) -> Option<Vec<u8>> {
        let due = |flag: &mut bool| std::mem::take(flag);
        if due(&mut self.add) {
            Some(message(port, DEVICE_ADD, 0, &[]))
        } else if due(&mut self.console) {
            Some(message(port, CONSOLE_PORT, 1, &[]))
        } else if due(&mut self.name) {
            // "the UTF-8 name of the port ... (without a NUL terminator)".
            Some(message(port, PORT_NAME, 1, name.as_bytes()))
        } else if due(&mut self.open) {
            Some(message(port, PORT_OPEN, open.into(), &[]))
        } else if due(&mut self.size) {
            // struct virtio_console_resize has columns first.
            let Size { cols, rows } = size?;
            Some(message(
                port,
                RESIZE,
                0,
                &[cols.to_le_bytes(), rows.to_le_bytes()].concat(),
            ))
        } else {
            None
        }
    }
}

fn message(port: usize, event: u16, value: u16, rest: &[u8]) -> Vec<u8> {
    let port = u32::try_from(port).expect("ports are few");
    [
        &port.to_le_bytes()[..],
        &event.to_le_bytes(),
        &value.to_le_bytes(),
        rest,
    ]
    .concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_of_the_driver_are_understood() {
        let parse = |bytes| FromDriver::parse(bytes, 2);
        assert_eq!(
            parse([9, 9, 9, 9, 0, 0, 1, 0]),
            Some(FromDriver::DeviceReady)
        );
        assert_eq!(
            parse([1, 0, 0, 0, 3, 0, 1, 0]),
            Some(FromDriver::PortReady { port: 1 })
        );
        let open = |open| Some(FromDriver::PortOpen { port: 0, open });
        assert_eq!(parse([0, 0, 0, 0, 6, 0, 1, 0]), open(true));
        assert_eq!(parse([0, 0, 0, 0, 6, 0, 0, 0]), open(false));
    }

    #[test]
    fn nonsense_is_not() {
        let nonsense = [
            [0, 0, 0, 0, 0, 0, 0, 0],
            [2, 0, 0, 0, 3, 0, 1, 0],
            [0, 0, 0, 0, 3, 0, 0, 0],
            [255, 255, 255, 255, 6, 0, 1, 0],
            [0, 0, 0, 0, 6, 0, 2, 0],
            [0, 0, 0, 0, 7, 0, 1, 0],
            [0, 0, 0, 0, 255, 255, 1, 0],
        ];
        assert_eq!(nonsense.map(|bytes| FromDriver::parse(bytes, 2)), [None; 7]);
    }

    #[test]
    fn what_is_due_is_told_once_and_in_order() {
        let mut untold = Untold {
            add: true,
            console: true,
            size: true,
            name: true,
            open: true,
        };
        let size = Some(Size { cols: 80, rows: 25 });
        let told: Vec<_> = std::iter::from_fn(|| untold.next(3, "ab", size, true)).collect();
        assert_eq!(
            told,
            [
                vec![3, 0, 0, 0, 1, 0, 0, 0],
                vec![3, 0, 0, 0, 4, 0, 1, 0],
                vec![3, 0, 0, 0, 7, 0, 1, 0, b'a', b'b'],
                vec![3, 0, 0, 0, 6, 0, 1, 0],
                vec![3, 0, 0, 0, 5, 0, 0, 0, 80, 0, 25, 0],
            ]
        );
        assert_eq!(untold, Untold::default());
    }
}
