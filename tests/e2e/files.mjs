// Runs cases of a real client of version 3 of the artifact protocol against the server that the actions' own variables
// name; what it uploads is listed and downloaded by the newest client too.
//
//     node files.mjs artifact-1.1.3 <case>[,<case>…]     (`all` runs every case)
//
// Reports as client.mjs does, and adds to the same ledger.
import assert from 'node:assert/strict'
import fs from 'node:fs'
import path from 'node:path'
import { MiB, assertSameFiles, hashFile, makeFiles, manyFiles, runCases } from './common.mjs'

const [clientName, chosen] = process.argv.slice(2)
assert(clientName?.startsWith('artifact-1.') && chosen, 'usage: files.mjs artifact-1.1.3 <case>[,<case>…]|all')

const BIG_BYTES = Math.min(40 * MiB, Number(process.env.WHARFINGER_TEST_BIG_BYTES || 40 * MiB))
const NEWEST = 'artifact-6.2.1'

const module = await import(clientName)
const client = (module.create ? module : module.default).create()
const { DefaultArtifactClient } = await import(NEWEST)
const newest = new DefaultArtifactClient()

async function upload(name, { root, files }) {
  const uploaded = await client.uploadArtifact(name, files, root, { continueOnError: false })
  assert.deepEqual(uploaded.failedItems, [])
  assert.equal(uploaded.artifactName, name)
  assert.equal(uploaded.artifactItems.length, files.length)
  return uploaded
}

async function assertServes(root, name, hashes) {
  const directory = path.join(root, 'downloaded')
  const { artifactName } = await client.downloadArtifact(name, directory)
  assert.equal(artifactName, name)
  assertSameFiles(directory, hashes)
  fs.rmSync(directory, { recursive: true })
}

/** The zip as the newest client sees it; what it is goes into the ledger. */
async function assertServesNewest(root, name, hashes) {
  const { artifacts } = await newest.listArtifacts()
  const [found, ...more] = artifacts.filter(artifact => artifact.name === name)
  assert.equal(more.length, 0)
  const directory = path.join(root, 'unpacked')
  const { digestMismatch } = await newest.downloadArtifact(found.id, { path: directory, expectedHash: found.digest })
  assert(!digestMismatch)
  assertSameFiles(directory, hashes)
  const whole = path.join(root, 'whole')
  await newest.downloadArtifact(found.id, { path: whole, skipDecompress: true })
  const [zip] = fs.readdirSync(whole)
  const size = fs.statSync(path.join(whole, zip)).size
  assert.equal(found.size, size, 'size')
  const ledger = process.env.WHARFINGER_TEST_LEDGER
  const note = { uploaded: found.id, size, sha256: hashFile(path.join(whole, zip)) }
  if (ledger) fs.appendFileSync(ledger, `${JSON.stringify(note)}\n`)
  for (const done of [directory, whole]) fs.rmSync(done, { recursive: true })
  return found
}

async function roundTrip(root, name, made) {
  const started = Date.now()
  const { size } = await upload(name, made)
  const sent = Date.now()
  await assertServes(root, name, made.hashes)
  const read = Date.now()
  const found = await assertServesNewest(root, name, made.hashes)
  return `${size} bytes, up ${sent - started} ms, down ${read - sent} ms; a zip of ${found.size}, ${Date.now() - read} ms`
}

const cases = {
  async small(root, name) {
    const contents = { 'hello.txt': 'hello\n', 'sub/compress.txt': 'again and '.repeat(7000), 'rand.bin': 100, 'ü 100%+.txt': 'x' }
    return roundTrip(root, name, await makeFiles(path.join(root, 'made'), contents))
  },

  async tree(root, name) {
    return roundTrip(root, name, await makeFiles(path.join(root, 'made'), manyFiles(name)))
  },

  async empty(root, name) {
    const contents = { 'empty.bin': '', 'folder/empty too': '', 'folder/full.txt': 'full' }
    return roundTrip(root, name, await makeFiles(path.join(root, 'made'), contents))
  },

  async big(root, name) {
    return roundTrip(root, name, await makeFiles(path.join(root, 'made'), { 'image.tar': BIG_BYTES }))
  },

  async packed(root, name) {
    // More than one chunk of gzip.
    const line = i => `${Buffer.from(`${i * 2654435761}`).toString('base64')} ${'='.repeat(i % 50)}\n`
    const text = Array.from({ length: 700_000 }, (_, i) => line(i)).join('')
    return roundTrip(root, name, await makeFiles(path.join(root, 'made'), { 'log.txt': text }))
  },

  async merge(root, name) {
    const made = await Promise.all(
      Array.from({ length: 4 }, (_, i) =>
        makeFiles(path.join(root, `${i}`), { [`own ${i}/f.txt`]: `of ${i}`, [`big ${i}`]: 3 * MiB, 'same.txt': 'of whomever' })
      )
    )
    // One after the other, and then at once.
    await upload(name, made[0])
    await assertServesNewest(root, name, made[0].hashes)
    await Promise.all(made.slice(1).map(one => upload(name, one)))
    const hashes = new Map(made.flatMap(one => [...one.hashes]))
    await assertServes(root, name, hashes)
    await assertServesNewest(root, name, hashes)
    // What is replaced is the last that came.
    const last = await makeFiles(path.join(root, 'last'), { 'same.txt': 'the last' })
    await upload(name, last)
    hashes.set('same.txt', last.hashes.get('same.txt'))
    await assertServes(root, name, hashes)
    await assertServesNewest(root, name, hashes)
    return `${hashes.size} files of 5 uploads`
  },

  async every(root, name) {
    const one = await makeFiles(path.join(root, 'one'), { 'a.txt': 'a', 'deep/er/b.txt': 'b' })
    const two = await makeFiles(path.join(root, 'two'), { 'a.txt': 'another a' })
    await upload(`${name} 1`, one)
    await upload(`${name} 2`, two)
    const directory = path.join(root, 'all')
    const downloaded = await client.downloadAllArtifacts(directory)
    for (const [suffix, { hashes }] of [['1', one], ['2', two]]) {
      const found = downloaded.find(({ artifactName }) => artifactName === `${name} ${suffix}`)
      assertSameFiles(found.downloadPath, hashes)
    }
    return `${downloaded.length} artifacts`
  }
}

const names = chosen === 'all' ? Object.keys(cases) : chosen.split(',')
for (const name of names) assert(cases[name], `no case ${name}`)
await runCases(clientName, names, name => cases[name])
process.exit(0)
