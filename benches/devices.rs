//! What the device model spends on a request: a driver on mock queues, no KVM
//! and no thread.

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use devices::virtio::Limits;
use devices::virtio::blk::{Blk, BlkConfig};
use devices::virtio::rng::Rng;
use devices::virtio::testing::{Buffer, Guest};

const BLOCK: u32 = 4096;

fn rng(criterion: &mut Criterion) {
    let mut guest = Guest::live(Rng::new());
    criterion.bench_function("rng/64 bytes", |bencher| {
        bencher.iter(|| guest.request(0, &[Buffer::In(64)]));
    });
}

fn blk(criterion: &mut Criterion) {
    let image = tempfile::NamedTempFile::new().expect("there is a temporary folder");
    image.as_file().set_len(1 << 20).expect("and room in it");
    let blk = Blk::open(BlkConfig {
        path: image.path().into(),
        readonly: false,
        direct: false,
        queues: 1,
        queue_size: 128,
        serial: "bench".into(),
        rates: Limits::default(),
        name: "blk0".into(),
    });
    let mut guest = Guest::live(blk.expect("the image can be opened"));
    let header = |kind: u32| [&kind.to_le_bytes()[..], &[0; 12]].concat();

    let mut group = criterion.benchmark_group("blk");
    group.throughput(Throughput::Bytes(BLOCK.into()));
    group.bench_function("read 4 KiB", |bencher| {
        let request = [Buffer::Out(header(0)), Buffer::In(BLOCK), Buffer::In(1)];
        bencher.iter(|| guest.request(0, &request));
    });
    group.bench_function("write 4 KiB", |bencher| {
        let data = vec![7; BLOCK as usize];
        let request = [Buffer::Out(header(1)), Buffer::Out(data), Buffer::In(1)];
        bencher.iter(|| guest.request(0, &request));
    });
    group.finish();
}

criterion_group!(benches, rng, blk);
criterion_main!(benches);
