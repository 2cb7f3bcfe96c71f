// Runs cases of one real client against the server that the actions' own variables name.
//
//     node client.mjs <client> <case>[,<case>…]     (`all` runs every case)
//
// Prints one line `@@{"client","case","status":"ok|na|fail","detail","ms"}` per case; all other
// output is the client's own log. Exits non-zero only if it could not report.
//
// Where WHARFINGER_TEST_LEDGER names a file, a line of JSON is added to it for everything the server acknowledged,
// `{"uploaded":id,"size","sha256"}` or `{"deleted":id}`, and `{"deleting":id}` before it is asked to.
import assert from 'node:assert/strict'
import { spawn } from 'node:child_process'
import fs from 'node:fs'
import { createRequire } from 'node:module'
import path from 'node:path'
import { fileURLToPath } from 'node:url'
import {
  MiB, assertSameFiles, hashFile, makeFiles, manyFiles, noiseBuffer, notApplicable, runCases, sha256, temporaryDirectory
} from './common.mjs'

const BIG_BYTES = Number(process.env.WHARFINGER_TEST_BIG_BYTES || 300 * MiB)

const self = fileURLToPath(import.meta.url)
const [clientName, ...args] = process.argv.slice(2)
const version = clientName?.match(/^artifact-(\d+)\.(\d+)\.(\d+)$/)?.slice(1).map(Number)

/** Is this artifact client at least major.minor? */
const since = (major, minor) => version[0] > major || (version[0] === major && version[1] >= minor)

// ---- the server, called by hand

function backendIds(token = process.env.ACTIONS_RUNTIME_TOKEN) {
  const { scp } = JSON.parse(Buffer.from(token.split('.')[1], 'base64url'))
  const [, run, job] = scp.split(' ').find(scope => scope.startsWith('Actions.Results:')).split(':')
  return { workflow_run_backend_id: run, workflow_job_run_backend_id: job }
}

async function twirp(method, body) {
  const url = new URL(`/twirp/github.actions.results.api.v1.ArtifactService/${method}`, process.env.ACTIONS_RESULTS_URL)
  const response = await fetch(url, {
    method: 'POST',
    headers: { 'content-type': 'application/json', authorization: `Bearer ${process.env.ACTIONS_RUNTIME_TOKEN}` },
    body: JSON.stringify({ ...backendIds(), ...body })
  })
  const answer = await response.json()
  assert(response.ok, `${method}: ${response.status} ${JSON.stringify(answer)}`)
  return answer
}

// ---- what all artifact cases do

async function loadArtifactClient() {
  const directory = path.join(path.dirname(self), 'node_modules', clientName)
  // The SDK that is inside those actions' bundles; npm's overrides must have put it there.
  if (!since(5, 0)) assert.equal(sdkVersion(directory), '12.17.0', `${clientName} has another @azure/storage-blob`)
  const module = await import(clientName)
  const { DefaultArtifactClient } = module.DefaultArtifactClient ? module : module.default
  return new DefaultArtifactClient()
}

function sdkVersion(directory) {
  const manifest = path.join(directory, 'node_modules/@azure/storage-blob/package.json')
  return fs.existsSync(manifest) ? JSON.parse(fs.readFileSync(manifest)).version : sdkVersion(path.dirname(directory))
}

let client

function note(entry) {
  const ledger = process.env.WHARFINGER_TEST_LEDGER
  if (ledger) fs.appendFileSync(ledger, `${JSON.stringify(entry)}\n`)
}

async function upload(name, { root, files }, options) {
  const uploaded = await client.uploadArtifact(name, files, root, options)
  note({ uploaded: uploaded.id, size: uploaded.size, sha256: uploaded.digest })
  assert(Number.isSafeInteger(uploaded.id) && uploaded.id > 0, `id ${uploaded.id}`)
  if (since(2, 3)) assert.match(uploaded.digest, /^[0-9a-f]{64}$/)
  return uploaded
}

const listed = async name => (await client.listArtifacts()).artifacts.filter(artifact => artifact.name === name)

function assertDescribes(artifact, name, uploaded) {
  assert.equal(artifact.name, name)
  assert.equal(artifact.id, uploaded.id, 'id')
  assert.equal(artifact.size, uploaded.size, 'size')
  assert(Number.isFinite(artifact.createdAt?.getTime()), `createdAt ${artifact.createdAt}`)
  if (since(2, 3)) assert.equal(artifact.digest, `sha256:${uploaded.digest}`, 'digest')
}

async function download(id, directory, options) {
  const { downloadPath, digestMismatch } = await client.downloadArtifact(id, { path: directory, ...options })
  assert.equal(downloadPath, directory)
  assert(!digestMismatch, 'the client saw another digest than the list says')
}

/** List, get by name, download (by the id of each, if both) and compare. */
async function assertServes(name, uploaded, { hashes }, { once } = {}) {
  const found = await listed(name)
  assert.equal(found.length, 1, `${found.length} artifacts of this name in the list`)
  assertDescribes(found[0], name, uploaded)
  const { artifact } = await client.getArtifact(name)
  assertDescribes(artifact, name, uploaded)
  for (const { id, digest } of once ? [artifact] : [uploaded, artifact]) {
    const directory = temporaryDirectory()
    try {
      await download(id, directory, { expectedHash: digest && `sha256:${digest.replace('sha256:', '')}` })
      assertSameFiles(directory, hashes)
    } finally {
      fs.rmSync(directory, { recursive: true, force: true })
    }
  }
}

async function roundTrip(name, made, options, serves) {
  const started = Date.now()
  const uploaded = await upload(name, made, options)
  const sent = Date.now()
  await assertServes(name, uploaded, made, serves)
  return `${uploaded.size} bytes, up ${sent - started} ms, down ${Date.now() - sent} ms`
}

async function assertGone(name, id) {
  assert.deepEqual(await listed(name), [], 'still in the list')
  await assert.rejects(client.getArtifact(name), /not found/i)
  const directory = temporaryDirectory()
  await assert.rejects(client.downloadArtifact(id, { path: directory }), /no artifacts found/i)
  fs.rmSync(directory, { recursive: true, force: true })
}

async function assertConflict(name, made) {
  await assert.rejects(client.uploadArtifact(name, made.files, made.root), error => {
    assert.match(error.message, /non-retryable.*\(409\).*exist/i)
    return true
  })
}

async function remove(name, id) {
  note({ deleting: id })
  assert.deepEqual(await client.deleteArtifact(name), { id })
  note({ deleted: id })
}

const needsDelete = () => since(2, 1) || notApplicable('2.0 has no deleteArtifact')

// ---- cases of every artifact client: (directory of its own, name of its own) => detail

const artifactCases = {
  async small(root, name) {
    return roundTrip(name, await makeFiles(root, { 'greeting.txt': 'Ahoy, Kai! 港\n' }))
  },

  async tree(root, name) {
    const made = await makeFiles(root, manyFiles(name))
    assert.equal(made.hashes.size, 2000)
    return roundTrip(name, made)
  },

  async empty(root, name) {
    return roundTrip(name, await makeFiles(root, { 'empty.bin': '', 'folder/empty too': '', 'folder/full.txt': 'full' }))
  },

  async tar300(root, name) {
    return roundTrip(name, await makeFiles(root, { 'image.tar': BIG_BYTES }), { compressionLevel: 0 }, { once: true })
  },

  async delete(root, name) {
    needsDelete()
    const made = await makeFiles(root, { 'doomed.txt': name })
    const { id } = await upload(name, made)
    assert.equal((await listed(name)).length, 1)
    await remove(name, id)
    await assertGone(name, id)
    await assert.rejects(client.deleteArtifact(name), /not found/i)
    return 'not listed, and a clear error on get, download and a second delete'
  },

  async overwrite(root, name) {
    needsDelete()
    const first = await makeFiles(path.join(root, '1'), { 'same.txt': 'first', 'old.txt': 'old' })
    const second = await makeFiles(path.join(root, '2'), { 'same.txt': 'second' })
    const old = await upload(name, first)
    await assertConflict(name, second)
    await assertServes(name, old, first)
    // What upload-artifact does for `overwrite: true`.
    assert.equal((await client.getArtifact(name)).artifact.id, old.id)
    await remove(name, old.id)
    const uploaded = await upload(name, second)
    assert(uploaded.id > old.id, `the new id ${uploaded.id} must be above the old ${old.id}`)
    await assertServes(name, uploaded, second)
    return 'new id, new content; refused with 409 without the delete'
  },

  async conflict(root, name) {
    const first = await makeFiles(path.join(root, '1'), { 'same.txt': 'first' })
    const second = await makeFiles(path.join(root, '2'), { 'same.txt': 'second' })
    const uploaded = await upload(name, first)
    const started = Date.now()
    await assertConflict(name, second)
    const ms = Date.now() - started
    await assertServes(name, uploaded, first)
    return `409 after ${ms} ms, the first stays`
  },

  async twenty(root, name) {
    const all = await Promise.all(
      Array.from({ length: 20 }, async (_, i) => {
        // Some of more than one block.
        const made = await makeFiles(path.join(root, `${i}`), { [`file ${i}`]: i % 5 ? i * 100_000 : 9 * MiB, same: `${i}` })
        return { name: `${name} ${i}`, made }
      })
    )
    const started = Date.now()
    await Promise.all(all.map(async one => { one.uploaded = await upload(one.name, one.made) }))
    const sent = Date.now()
    assert.equal(new Set(all.map(one => one.uploaded.id)).size, 20, 'ids are not unique')
    await Promise.all(all.map(one => assertServes(one.name, one.uploaded, one.made, { once: true })))
    return `up ${sent - started} ms, down ${Date.now() - sent} ms`
  },

  async killed(root, name) {
    const half = await makeFiles(path.join(root, 'half'), { 'image.tar': 64 * MiB })
    const whole = await makeFiles(path.join(root, 'whole'), { 'image.tar': 64 * MiB })
    const child = spawn(process.execPath, [...process.execArgv, self, clientName, '--die', name, half.root, ...half.files], { stdio: 'inherit' })
    const signal = await new Promise((resolve, reject) => child.on('error', reject).on('exit', (_, signal) => resolve(signal)))
    assert.equal(signal, 'SIGKILL', 'the first upload was to be killed half way')
    assert.deepEqual(await listed(name), [], 'half an artifact is in the list')
    return roundTrip(name, whole, { compressionLevel: 0 }, { once: true })
  },

  async isolation(root, name) {
    const others = process.env.WHARFINGER_TEST_OTHER_TOKENS?.split(',').filter(Boolean) ?? []
    assert(others.length > 0, 'WHARFINGER_TEST_OTHER_TOKENS is not set')
    const own = process.env.ACTIONS_RUNTIME_TOKEN
    const run = backendIds().workflow_run_backend_id
    const all = [own, ...others].map(token => ({ token }))
    // The client reads the token at every call.
    const as = one => { process.env.ACTIONS_RUNTIME_TOKEN = one.token }
    try {
      for (const [i, one] of all.entries()) {
        as(one)
        assert.equal(backendIds().workflow_run_backend_id, run, 'the tokens must be of the same run id')
        one.made = await makeFiles(path.join(root, `${i}`), { 'whose.txt': `identity ${i}`, [`only ${i}.txt`]: '' })
        one.uploaded = await upload(name, one.made)
      }
      for (const one of all) {
        as(one)
        await assertServes(name, one.uploaded, one.made)
        for (const { uploaded: { id } } of all.filter(other => other.uploaded.id !== one.uploaded.id)) {
          await assert.rejects(client.downloadArtifact(id, { path: root }), /no artifacts found/i)
        }
      }
      if (since(2, 1)) {
        as(all[0])
        await remove(name, all[0].uploaded.id)
        await assertGone(name, all[0].uploaded.id)
        for (const one of all.slice(1)) {
          as(one)
          await assertServes(name, one.uploaded, one.made, { once: true })
        }
      }
    } finally {
      process.env.ACTIONS_RUNTIME_TOKEN = own
    }
    return `${all.length} identities, each sees its own`
  },

  async attempts(root) {
    const tokens = JSON.parse(process.env.WHARFINGER_TEST_ATTEMPT_TOKENS ?? notApplicable('has no tokens of two attempts'))
    const own = process.env.ACTIONS_RUNTIME_TOKEN
    const as = async (who, act) => {
      process.env.ACTIONS_RUNTIME_TOKEN = tokens[who]
      try {
        return await act()
      } finally {
        process.env.ACTIONS_RUNTIME_TOKEN = own
      }
    }
    const save = async (who, name) => {
      const made = await makeFiles(path.join(root, who, name), { 'who.txt': `${name} of ${who}` })
      return as(who, async () => ({ name, made, uploaded: await upload(name, made) }))
    }
    const sees = (who, ...all) =>
      as(who, async () => {
        const names = (await client.listArtifacts()).artifacts.map(artifact => artifact.name).sort()
        assert.deepEqual(names, all.map(one => one.name).sort(), `what ${who} sees`)
        for (const one of all) await assertServes(one.name, one.uploaded, one.made, { once: true })
      })
    const image = await save('build1', 'image')
    const log = await save('build1', 'log')
    const report = await save('test1', 'report')
    await sees('use2', image, log, report)
    // `build` is run again, and has the name of before for itself.
    await sees('build2', report)
    const again = await save('build2', 'image')
    assert(again.uploaded.id > image.uploaded.id)
    await sees('use2', again, report)
    await sees('build2', again, report)
    await as('build2', () => assertConflict('image', again.made))
    // Nothing was overwritten.
    await sees('test1', image, log, report)
    return 'a job that is run again takes its names again; what was not run again stays'
  },

  async across(root, name) {
    // What download-artifact does with `github-token`, `repository` and `run-id`.
    const token = process.env.WHARFINGER_TEST_API_TOKEN ?? notApplicable('has no API token')
    const workflowRunId = Number(backendIds().workflow_run_backend_id)
    const findBy = { token, workflowRunId, repositoryOwner: 'octo', repositoryName: 'demo' }
    const made = await makeFiles(root, { 'a.txt': 'across', noise: 3 * MiB })
    const uploaded = await upload(name, made)
    const find = async () => (await client.listArtifacts({ findBy })).artifacts.filter(one => one.name === name)
    const [found, ...more] = await find()
    assert.equal(more.length, 0)
    assert.equal(found.id, uploaded.id)
    assert.equal(found.size, uploaded.size)
    assert.equal((await client.getArtifact(name, { findBy })).artifact.id, uploaded.id)
    const directory = temporaryDirectory()
    await download(uploaded.id, directory, { findBy, expectedHash: uploaded.digest && `sha256:${uploaded.digest}` })
    assertSameFiles(directory, made.hashes)
    fs.rmSync(directory, { recursive: true })
    // Another repository, and another run.
    for (const other of [{ repositoryName: 'other' }, { workflowRunId: workflowRunId + 1 }]) {
      await assert.rejects(client.getArtifact(name, { findBy: { ...findBy, ...other } }))
    }
    if (!since(2, 1)) return 'list, get, download'
    if (!since(6, 0)) {
      // The octokit that is inside the action, by pages. From 6.0 on it can't be required.
      const { getOctokit } = createRequire(path.join(path.dirname(self), 'node_modules', clientName, 'lib/'))('@actions/github')
      const octokit = getOctokit(token)
      const of = { owner: 'octo', repo: 'demo', run_id: workflowRunId, per_page: 1 }
      const all = await octokit.paginate(octokit.rest.actions.listWorkflowRunArtifacts, of)
      assert.equal(all.filter(artifact => artifact.id === uploaded.id).length, 1)
      const { data } = await octokit.rest.actions.getArtifact({ ...of, artifact_id: uploaded.id })
      assert.equal(data.name, name)
    }
    await client.deleteArtifact(name, { findBy })
    assert.deepEqual(await find(), [])
    return 'list, get, download, delete'
  },

  async beside(root) {
    const meeting = process.env.WHARFINGER_TEST_MEETING ?? notApplicable('has nobody to meet')
    // Of the same names as those of another job at the same time, and of other content.
    const all = await Promise.all(
      [0, 1, 2].map(async i => ({
        name: `beside ${i}`,
        made: await makeFiles(path.join(root, `${i}`), { 'whose.txt': process.env.ACTIONS_RUNTIME_TOKEN, noise: 9 * MiB })
      }))
    )
    fs.writeFileSync(path.join(meeting, `${process.pid}`), '')
    while (fs.readdirSync(meeting).length < 2) await new Promise(resolve => setTimeout(resolve, 5))
    await Promise.all(all.map(async one => { one.uploaded = await upload(one.name, one.made) }))
    await Promise.all(all.map(one => assertServes(one.name, one.uploaded, one.made)))
    assert.equal((await client.listArtifacts()).artifacts.length, all.length, 'artifacts of another job in the list')
    return `${all.length} artifacts, each its own`
  },

  async raw(root, name) {
    if (!since(6, 2)) notApplicable('no skipArchive before 6.2')
    const tag = name.slice(-8)
    const types = {
      [`report-${tag}.html`]: 'text/html',
      [`50% Überblick 港 🚢 it's #1;a,b ${tag}.bin`]: 'application/octet-stream'
    }
    for (const [fileName, type] of Object.entries(types)) {
      const made = await makeFiles(path.join(root, type), { [fileName]: `<h1>${fileName}</h1>\n` })
      // The artifact is named after its file, whatever name is given.
      const uploaded = await upload('ignored', made, { skipArchive: true })
      await assertServes(fileName, uploaded, made)
      const { signed_url } = await twirp('GetSignedArtifactURL', { name: fileName })
      const response = await fetch(signed_url)
      assert.equal(response.headers.get('content-type').split(';')[0], type)
      assert.equal(sha256(Buffer.from(await response.arrayBuffer())), uploaded.digest)
    }
    // A zip with skipDecompress comes as one file, byte for byte what was uploaded.
    const zipped = await upload(name, await makeFiles(path.join(root, 'zip'), { 'a.txt': 'a' }))
    const directory = path.join(root, 'zip-download')
    await download(zipped.id, directory, { skipDecompress: true })
    const [saved, ...more] = fs.readdirSync(directory)
    assert.equal(more.length, 0)
    assert.equal(hashFile(path.join(directory, saved)), zipped.digest)
    return `type and name kept; skipDecompress saves ${saved.replace(name, '<name>')}`
  }
}

/** The first half of `killed`: dies in the middle of its upload, at the moment the client reports two blocks as sent. */
async function uploadAndDie(name, root, ...files) {
  const write = process.stdout.write
  process.stdout.write = function (chunk, ...rest) {
    if (Number(/^Uploaded bytes (\d+)/.exec(chunk)?.[1]) >= 16 * MiB) process.kill(process.pid, 'SIGKILL')
    return write.call(this, chunk, ...rest)
  }
  client = await loadArtifactClient()
  await client.uploadArtifact(name, files, root, { compressionLevel: 0 })
}

// ---- cases of the newest SDK itself

async function sdkUpload(name, store) {
  const { BlockBlobClient } = await import('@azure/storage-blob')
  const { ok, signed_upload_url } = await twirp('CreateArtifact', { name, version: 7, mime_type: 'application/octet-stream' })
  assert.equal(ok, true)
  const blob = new BlockBlobClient(signed_upload_url)
  const content = await store(blob)
  const finalized = await twirp('FinalizeArtifact', {
    name,
    // As the clients do: a zero is left out.
    ...(content.length > 0 && { size: String(content.length) }),
    hash: `sha256:${sha256(content)}`
  })
  assert.equal(finalized.ok, true)
  note({ uploaded: Number(finalized.artifact_id), size: content.length, sha256: sha256(content) })
  const { signed_url } = await twirp('GetSignedArtifactURL', { name })
  const stored = new BlockBlobClient(signed_url)
  const properties = await stored.getProperties()
  assert.equal(properties.contentLength, content.length)
  assert.equal(properties.contentType, 'application/octet-stream')
  await assertReads(stored, content)
  return { blob, stored, signed_url, content }
}

/** SDK reads: the whole, or a range, which it asks for with x-ms-range. */
async function assertReads(stored, content, offset = 0, count = undefined) {
  const response = await stored.download(offset, count)
  const chunks = []
  for await (const chunk of response.readableStreamBody) chunks.push(chunk)
  const expected = content.subarray(offset, count && offset + count)
  assert.equal(sha256(Buffer.concat(chunks)), sha256(expected), `download(${offset}, ${count})`)
  assert.equal(response.contentLength, expected.length)
}

const httpHeaders = { blobHTTPHeaders: { blobContentType: 'application/octet-stream' } }
const status = code => error => { assert.equal(error.statusCode, code, error.message); return true }

const sdkCases = {
  async blocks(_, name) {
    const blockId = i => Buffer.from(`block-${String(i).padStart(6, '0')}`).toString('base64')
    const blocks = [MiB, 3 * MiB, 100_000, 1, 2 * MiB].map((size, i) => noiseBuffer(`${name}${i}`, size))
    const order = [4, 1, 0, 3, 2]
    const { blob, stored, signed_url, content } = await sdkUpload(name, async blob => {
      const stage = (i, data = blocks[i]) => blob.stageBlock(blockId(i), data, data.length)
      await stage(1, noiseBuffer('sent twice, the last one wins', 2 * MiB))
      await stage(9, noiseBuffer('not in the list', 1000))
      await Promise.all([3, 0, 4, 2, 1].map(i => stage(i)))
      await blob.commitBlockList(order.map(blockId), httpHeaders)
      return Buffer.concat(order.map(i => blocks[i]))
    })
    const size = content.length
    for (const [offset, count] of [[0, 1], [5, 100], [2 * MiB - 3, 7], [size - 1, 1], [size - 100_002, 100_002], [MiB, undefined]]) {
      await assertReads(stored, content, offset, count)
    }
    // HEAD, then several ranges at once.
    const buffer = await stored.downloadToBuffer(0, undefined, { blockSize: MiB, concurrency: 4 })
    assert.equal(sha256(buffer), sha256(content), 'downloadToBuffer')
    for (const [range, from, to] of [['bytes=10-19', 10, 19], [`bytes=${MiB}-`, MiB, size - 1], ['bytes=-5', size - 5, size - 1]]) {
      const response = await fetch(signed_url, { headers: { range } })
      assert.equal(response.status, 206, range)
      assert.equal(response.headers.get('content-range'), `bytes ${from}-${to}/${size}`)
      assert.equal(sha256(Buffer.from(await response.arrayBuffer())), sha256(content.subarray(from, to + 1)), range)
    }
    await assert.rejects(stored.download(size), status(416))
    // A repeated list is a retry; another one comes too late.
    await blob.commitBlockList(order.map(blockId), httpHeaders)
    await assert.rejects(blob.commitBlockList([blockId(0)], httpHeaders), status(409))
    await assertReads(stored, content)
    return `5 blocks out of order, one twice, one unlisted; ranges of ${size} bytes`
  },

  async putblob(_, name) {
    const put = (blob, content) => blob.upload(content, content.length, httpHeaders)
    const { blob, stored, content } = await sdkUpload(name, async blob => {
      await put(blob, noiseBuffer('first', 500_000))
      await put(blob, noiseBuffer('second', 100))
      const id = Buffer.from('block').toString('base64')
      await blob.stageBlock(id, 'a list over a single upload', 27)
      await blob.commitBlockList([id], httpHeaders)
      const content = noiseBuffer(name, 5 * MiB + 1)
      await put(blob, content)
      return content
    })
    await assertReads(stored, content, 4 * MiB, 1000)
    await assert.rejects(put(blob, noiseBuffer('too late', 10)), status(409))
    await assertReads(stored, content)
    await sdkUpload(`${name} empty`, async blob => { await put(blob, Buffer.alloc(0)); return Buffer.alloc(0) })
    return 'each upload replaces the one before until the finalize; an empty one too'
  }
}

// ---- running

assert(args[0] && (version || clientName === 'storage-blob'), 'usage: client.mjs artifact-<version>|storage-blob <case>[,<case>…]|all')
if (args[0] === '--die') {
  await uploadAndDie(...args.slice(1))
  process.exit(0)
}

const [own, foreign] = version ? [artifactCases, sdkCases] : [sdkCases, artifactCases]
const why = version ? 'a case of the SDK alone' : 'a case of the artifact clients'
const names = args[0] === 'all' ? [...Object.keys(artifactCases), ...Object.keys(sdkCases)] : args[0].split(',')
for (const name of names) assert(own[name] ?? foreign[name], `no case ${name}`)
if (version) client = await loadArtifactClient()
await runCases(clientName, names, name => own[name] ?? (() => notApplicable(why)))
// A timed-out case may have left something open.
process.exit(0)
